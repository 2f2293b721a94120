"""Opening a checkpoint: the right format, names that help, and no guess about what is unknown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import transload
from containers import put, small_gguf
from transload.errors import ConfigError, FormatError, Unsupported
from transload.formats.neutral import Neutral
from transload.quant import QTensor, QuantSpec

LAYER = "model.layers.0."


def model(folder: Path, tensors: dict[str, Tensor], config: dict[str, object] | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        put(folder / "config.json", json.dumps(config).encode())
    return folder


def floats() -> dict[str, Tensor]:
    return {
        "model.embed_tokens.weight": torch.ones(8, 4),
        LAYER + "mlp.up_proj.weight": torch.arange(12.0).reshape(3, 4).bfloat16(),
        LAYER + "mlp.up_proj.bias": torch.zeros(3),
        LAYER + "mlp.experts.gate_up_proj": torch.zeros(2, 3, 4),
        LAYER + "mlp.experts.gate_up_proj_bias": torch.zeros(2, 3, 1),
        LAYER + "input_layernorm.weight": torch.ones(4),
        LAYER + "position_ids": torch.arange(4).reshape(1, 4),
        "visual.patch_embed.weight": torch.zeros(2, 3, 2, 2),
        "lm_head.weight": torch.ones(8, 4),
    }


def test_a_float_checkpoint_opens_as_plain(tmp_path: Path) -> None:
    checkpoint = transload.open(model(tmp_path, floats(), {"model_type": "qwen3"}))
    assert checkpoint.format.name == "plain"
    assert checkpoint.config == {"model_type": "qwen3"}
    assert set(checkpoint.entries) == set(floats())
    entry = checkpoint.entries[LAYER + "mlp.up_proj.weight"]
    assert (entry.spec, entry.shape, entry.dtype, entry.stored_bytes) == (None, (3, 4), "BF16", 24)


def test_modules_are_the_linears(tmp_path: Path) -> None:
    checkpoint = transload.open(model(tmp_path, floats()))
    assert checkpoint.modules() == {
        LAYER + "mlp.up_proj": None,
        LAYER + "mlp.experts.gate_up_proj": None,
        "lm_head": None,
    }


def test_a_linear_is_found_by_module_and_by_tensor_name(tmp_path: Path) -> None:
    spec = QuantSpec(4, 2, scale_dtype=torch.float16)
    w = QTensor(spec, torch.tensor([[1, 2, 3, 4]], dtype=torch.uint8), torch.ones(1, 2).half())
    tensors = Neutral().encode("m", w) | {"n.weight": torch.ones(2, 2)}
    checkpoint = transload.open(model(tmp_path, tensors, Neutral().finish({"m": spec}, {})["config.json"]))
    for name in ("m", "m.weight"):
        found = checkpoint[name]
        assert isinstance(found, QTensor)
        assert found.equal(w)
    for name in ("n", "n.weight"):
        assert isinstance(checkpoint[name], Tensor)
        assert name in checkpoint
    assert checkpoint.modules() == {"m": spec, "n": None}
    assert "gone" not in checkpoint
    with pytest.raises(ConfigError, match="'m' is quantized: decode it"):
        checkpoint.read(checkpoint.entries["m"])
    with pytest.raises(ConfigError, match=r"'n\.weight' is not quantized: read it"):
        checkpoint.decode(checkpoint.entries["n.weight"])


def test_a_wrong_name_is_answered_with_near_ones(tmp_path: Path) -> None:
    checkpoint = transload.open(model(tmp_path, floats()))
    with pytest.raises(
        ConfigError, match=r"'model\.layers\.0\.mlp\.up_prj'; the nearest are model\.layers\.0\.mlp\.up_proj"
    ):
        checkpoint[LAYER + "mlp.up_prj"]


@pytest.mark.parametrize(
    ("config", "files", "words"),
    [
        ({"quantization_config": {"quant_method": "quip_sharp"}}, {}, "quantized by 'quip_sharp'"),
        ({"text_config": {"quantization_config": {"quant_method": "quip_sharp"}}}, {}, "quantized by 'quip_sharp'"),
        ({"compression_config": {"bits": 3}}, {}, "quantized by 'compression_config'"),
        ({}, {"hf_quant_config.json": {"producer": {}}}, r"quantized by 'hf_quant_config\.json'"),
    ],
    ids=["method", "nested", "no method", "file"],
)
def test_an_unknown_quantization_is_refused_by_its_name(
    tmp_path: Path, config: dict[str, object], files: dict[str, object], words: str
) -> None:
    folder = model(tmp_path, floats(), config)
    for name, value in files.items():
        put(folder / name, json.dumps(value).encode())
    with pytest.raises(Unsupported, match=words) as e:
        transload.open(folder)
    assert str(folder) in str(e.value)
    assert "plain" in str(e.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_packed_weights_without_a_config_are_not_taken_for_floats(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = model(tmp_path, {"a.qweight": torch.zeros(4, 4).to(dtype)})
    with pytest.raises(FormatError, match=r"'a\.qweight' is .* looks quantized.*config\.json missing"):
        transload.open(folder)


def test_files_to_carry_and_code_to_leave_are_listed(tmp_path: Path) -> None:
    carried = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "vocab.json"]
    carried += ["merges.txt", "tokenizer.model", "preprocessor_config.json", "LICENSE", "special_tokens_map.json"]
    left = ["quantize_config.json", "model.safetensors.index.json.bak", "README.md", "pytorch_model.bin", ".hidden.txt"]
    folder = model(tmp_path, floats(), {})
    for name in [*carried, *left, "modeling_custom.py"]:
        put(folder / name, b"{}" if name.endswith(".json") and name != "quantize_config.json" else b"x")
    (folder / "quantize_config.json").unlink()
    (folder / "tokenizer").mkdir()
    for place in (folder, folder / "model.safetensors"):
        checkpoint = transload.open(place)
        assert sorted(p.name for p in checkpoint.carried_files()) == sorted(carried)
        assert [p.name for p in checkpoint.custom_code()] == ["modeling_custom.py"]


def test_a_gguf_file_carries_nothing_from_its_folder(tmp_path: Path) -> None:
    from transload.formats.plain import Plain
    from transload.source import open_source

    put(tmp_path / "LICENSE", b"x")
    source = open_source(put(tmp_path / "a.gguf", small_gguf()))
    assert not Plain().detects(source)
    assert not Neutral().detects(source)


def test_errors_while_decoding_name_file_and_module_once(tmp_path: Path) -> None:
    spec = QuantSpec(4, 2, scale_dtype=torch.float16)
    w = QTensor(spec, torch.zeros(1, 4, dtype=torch.uint8), torch.ones(1, 2).half())
    tensors = Neutral().encode("m", w) | {"m.scales": torch.full((1, 2), float("nan")).half()}
    folder = model(tmp_path, tensors, Neutral().finish({"m": spec}, {})["config.json"])
    with pytest.raises(FormatError, match="scales contain NaN") as e:
        transload.open(folder)["m"]
    assert str(e.value).startswith(f"{folder / 'model.safetensors'}: m: scales")
