"""Ports of small checkpoints: exact where the target can, refused where it cannot, changed only when asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_model import CASES, build
from memory_source import MemorySource, random_weight, written
from safetensors.torch import load_file

import transload
from transload.errors import CannotHold, ConfigError, FormatError, OutputExists, TransloadError
from transload.formats import find_format
from transload.quant import ActSpec, QTensor, QuantSpec, Zero

LAYER = "model.layers.0."
CONFIG = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16"}
FLOATS = {
    "model.embed_tokens.weight": torch.randn(32, 64, dtype=torch.bfloat16),
    "model.norm.weight": torch.ones(64),
    LAYER + "mlp.gate.weight": torch.randn(4, 64, dtype=torch.bfloat16),
    LAYER + "mlp.gate.e_score_correction_bias": torch.randn(4),
    LAYER + "self_attn.q_proj.bias": torch.randn(32, dtype=torch.float16),
}


def spec(bits: int, group: int, zero: Zero = Zero.MIDPOINT, dtype: torch.dtype = torch.float16) -> QuantSpec:
    return QuantSpec(bits, group, zero=zero, scale_dtype=dtype)


def model(folder: Path, weights: dict[str, QTensor], format: str = "transload", **config: Any) -> Path:
    """A folder in `format` with these quantized modules, some floats, a tokenizer and settings."""
    source = written(find_format(format), weights)
    source.config.update(CONFIG | config)
    files = source.files | {"generation_config.json": {"eos_token_id": 2}, "tokenizer_config.json": {"a": 1}}
    return MemorySource(source.tensors | FLOATS, source.config, files).save(folder)


def module(name: str, made: QuantSpec, n: int = 32, k: int = 64) -> dict[str, QTensor]:
    return {LAYER + name: random_weight(made, n, k)}


# What each target holds exactly, up to wider codes, wider scales and zero points written out.
EXACT = [
    ("compressed-tensors", spec(4, 32)),
    ("compressed-tensors", spec(4, 16, Zero.CODES, torch.float32)),
    ("compressed-tensors", spec(5, 32)),
    ("compressed-tensors", spec(6, 16, dtype=torch.float32)),
    ("gptq", spec(4, 32, Zero.CODES)),
    ("gptq_v2", spec(5, 32)),
    ("awq", spec(4, 32)),
    ("msmodelslim", spec(4, 32)),
    ("transload", spec(4, 32, Zero.MINS)),
    ("fp32", spec(4, 32, Zero.MINS)),
]


@pytest.mark.parametrize(("to", "made"), EXACT, ids=lambda v: str(v).replace(" ", "-"))
def test_the_same_numbers_in_another_format(to: str, made: QuantSpec, tmp_path: Path) -> None:
    weights = module("mlp.up_proj", made) | module("mlp.down_proj", made, 64, 32)
    source = model(tmp_path / "a", weights)
    report = transload.port(source, tmp_path / "b", to)
    assert report.exact
    assert len(report.modules) == 2
    result = transload.open(tmp_path / "b")
    for name, w in weights.items():
        found = result[name]
        values = found.dequantize() if isinstance(found, QTensor) else found
        assert torch.equal(values, w.dequantize())
    assert transload.verify(source, tmp_path / "b").equal


def test_every_float_tensor_and_file_is_carried(tmp_path: Path) -> None:
    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32)))
    (source / "modeling_strange.py").write_text("raise SystemExit")
    report = transload.port(source, tmp_path / "b", "compressed-tensors")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    for name, t in FLOATS.items():
        assert torch.equal(stored[name], t)
        assert stored[name].dtype == t.dtype
    assert report.carried == len(FLOATS)
    names = {p.name for p in (tmp_path / "b").iterdir()}
    assert names == {"config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors"}
    assert set(report.files) == names - {"model.safetensors"}
    assert any("modeling_strange.py" in note for note in report.notes)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert config["quantization_config"]["ignore"] == [r"re:^model\.layers\.\d+\.mlp\.gate$", "lm_head"]


def test_nothing_of_the_old_quantization_stays(tmp_path: Path) -> None:
    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32)), "gptq", text_config={"compression_config": {}})
    transload.port(source, tmp_path / "b", "bf16")
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["text_config"] == {}
    assert not (tmp_path / "b" / "quantize_config.json").exists()


def test_refusals_are_collected_before_anything_is_written(tmp_path: Path) -> None:
    weights = module("mlp.up_proj", spec(4, 32, Zero.MINS)) | module("mlp.down_proj", spec(4, 32, Zero.FLOATS))
    weights |= module("self_attn.q_proj", spec(4, 32))
    weights["model.layers.1.mlp.up_proj"] = random_weight(spec(4, 32, Zero.MINS), 32, 64, 1)
    source = model(tmp_path / "a", weights)
    with pytest.raises(CannotHold) as e:
        transload.port(source, tmp_path / "b", "compressed-tensors")
    message = str(e.value)
    assert "cannot take 3 of 4 quantized modules exactly" in message
    assert "no float minimum per group (2 x model.layers.*.mlp.up_proj)" in message
    assert "model.layers.*.mlp.down_proj" in message
    assert "--requantize int8-g32" in message
    assert "--to transload, which holds every scheme" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_requantizing_changes_only_what_does_not_fit_and_says_by_how_much(tmp_path: Path) -> None:
    weights = module("mlp.up_proj", spec(4, 32, Zero.MINS)) | module("mlp.down_proj", spec(4, 32), 64, 32)
    source = model(tmp_path / "a", weights)
    report = transload.port(source, tmp_path / "b", "compressed-tensors", requantize="int8-g32")
    kept, changed = sorted(report.modules, key=lambda m: m.name)
    assert (kept.action, kept.difference) == ("repack", None)
    assert (changed.action, changed.target) == ("requantize", "int8 g32 sym fp16")
    assert not report.exact
    found = transload.open(tmp_path / "b")[LAYER + "mlp.up_proj"]
    assert isinstance(found, QTensor)
    apart = (found.dequantize() - weights[LAYER + "mlp.up_proj"].dequantize()).double()
    assert changed.difference is not None
    assert changed.difference.max_error == pytest.approx(float(apart.abs().max()))
    assert changed.difference.rms_error == pytest.approx(float(apart.square().mean().sqrt()))
    assert changed.difference.sqnr_db > 40
    verification = transload.verify(source, tmp_path / "b")
    assert [d.name for d in verification.differing] == [LAYER + "mlp.up_proj.weight"]
    json.dumps(report.to_json(), allow_nan=False)


def test_requantizing_everything_leaves_heads_in_float(tmp_path: Path) -> None:
    weights = module("mlp.up_proj", spec(4, 32)) | {"lm_head": random_weight(spec(8, 32), 32, 64)}
    source = model(tmp_path / "a", weights)
    report = transload.port(source, tmp_path / "b", "gptq", requantize="int8-channel", requantize_all=True)
    assert {m.name: m.action for m in report.modules} == {LAYER + "mlp.up_proj": "requantize", "lm_head": "dequantize"}
    found = transload.open(tmp_path / "b")["lm_head"]
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, weights["lm_head"].dequantize())


def test_a_requantized_scheme_takes_the_form_of_its_target(tmp_path: Path) -> None:
    # AWQ writes a zero point per group, and a symmetric scheme has one that is always 8.
    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32, Zero.MINS)))
    transload.port(source, tmp_path / "b", "awq", requantize="int4-g32")
    found = transload.open(tmp_path / "b")[LAYER + "mlp.up_proj"]
    assert isinstance(found, QTensor)
    assert bool((found.zeros == 8).all())


def test_an_embedding_becomes_float_and_the_rounding_is_reported(tmp_path: Path) -> None:
    weights = {"model.embed_tokens_2": random_weight(spec(8, 32), 32, 64)} | module("mlp.up_proj", spec(4, 32))
    weights["model.language_model.embed_tokens"] = weights.pop("model.embed_tokens_2")
    source = model(tmp_path / "a", weights)
    exact = transload.port(source, tmp_path / "b", "compressed-tensors")
    assert exact.exact
    assert transload.open(tmp_path / "b").entry("model.language_model.embed_tokens.weight").dtype == "F32"
    rounded = transload.port(source, tmp_path / "c", "compressed-tensors", floats="bf16")
    (moved,) = [m for m in rounded.modules if m.difference is not None]
    assert moved.name == "model.language_model.embed_tokens"
    assert moved.difference is not None
    assert 0 < moved.difference.rms_error < 0.1


def test_expert_stacks_are_written_one_by_one(tmp_path: Path) -> None:
    build(next(c for c in CASES if c.arch == "qwen3moe"), tmp_path / "m.gguf")
    report = transload.port(tmp_path / "m.gguf", tmp_path / "b", "fp32")
    stored = transload.open(tmp_path / "b").entries
    assert "model.layers.1.mlp.experts.3.down_proj.weight" in stored
    assert "model.layers.1.mlp.experts.down_proj.weight" not in stored
    assert report.exact
    assert transload.verify(tmp_path / "m.gguf", tmp_path / "b").equal


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.arch)
def test_a_gguf_becomes_a_folder_that_transformers_loads(case: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, meant = build(case, tmp_path / "m.gguf")
    report = transload.port(tmp_path / "m.gguf", tmp_path / "hf", "fp32")
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"} <= set(report.files)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    found = loaded.state_dict()
    assert torch.equal(found["lm_head.weight"], meant["lm_head.weight"])
    ids = AutoTokenizer.from_pretrained(tmp_path / "hf")("The quick fox", return_tensors="pt")["input_ids"]
    assert torch.isfinite(loaded(ids).logits).all()


def test_activations_are_declared_without_touching_weights(tmp_path: Path) -> None:
    weights = module("mlp.up_proj", spec(8, -1))
    source = model(tmp_path / "a", weights)
    transload.port(source, tmp_path / "b", "compressed-tensors", activations="int8")
    found = transload.open(tmp_path / "b")[LAYER + "mlp.up_proj"]
    assert isinstance(found, QTensor)
    assert found.equal(weights[LAYER + "mlp.up_proj"].with_act(ActSpec()))
    back = transload.port(tmp_path / "b", tmp_path / "c", "gptq", activations="16bit")
    assert back.exact


def test_progress_goes_from_nothing_to_everything(tmp_path: Path) -> None:
    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32)))
    seen: list[tuple[int, int, str]] = []
    transload.port(source, tmp_path / "b", "gptq", progress=lambda *step: seen.append(step))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 0
    assert [s[0] for s in seen] == sorted(s[0] for s in seen)
    assert any(LAYER in s[2] for s in seen)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"to": "gguf"}, ConfigError, "writes one file; call it b.gguf"),
        ({"to": "marlin"}, ConfigError, "no format 'marlin'.*engines: vllm==0.32"),
        ({"to": "gptq", "requantize": "four"}, ConfigError, "for example int4-g128"),
        ({"to": "gptq", "requantize_all": True}, ConfigError, "without requantize"),
        ({"to": "gptq", "floats": "fp8"}, ConfigError, "give one of bf16, fp16, fp32"),
        ({"to": "gptq", "activations": "fp8"}, ConfigError, "give one of keep, int8, 16bit"),
    ],
)
def test_arguments_are_checked_first(
    arguments: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32)))
    with pytest.raises(error, match=says):
        transload.port(source, tmp_path / "b", **arguments)
    assert not (tmp_path / "b").exists()


def test_an_existing_target_stays_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32)))
    transload.port(source, tmp_path / "b", "gptq")
    with pytest.raises(OutputExists):
        transload.port(source, tmp_path / "b", "awq")
    assert transload.open(tmp_path / "b").format.name == "gptq"
    transload.port(source, tmp_path / "b", "awq", overwrite=True)
    assert transload.open(tmp_path / "b").format.name == "awq"


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    weights = {f"model.layers.{i}.mlp.up_proj": random_weight(spec(4, 32), 32, 64, i) for i in range(8)}
    source = model(tmp_path / "a", weights)
    real, calls = os.pwrite, []

    def full(descriptor: int, data: Any, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 10:
            raise OSError(28, "No space left on device")
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(TransloadError, match=r"model\.safetensors: cannot be written: No space left"):
        transload.port(source, tmp_path / "b", "gptq")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_what_reads_back_differently_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transload.writer import Writer

    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32)))
    real = Writer.add

    def damaged(self: Writer, name: str, tensor: torch.Tensor) -> None:
        real(self, name, tensor + 1 if name.endswith("scales") else tensor)

    monkeypatch.setattr(Writer, "add", damaged)
    with pytest.raises(FormatError, match=r"up_proj\.scales read back differs"):
        transload.port(source, tmp_path / "b", "gptq")
    assert not (tmp_path / "b").exists()


def test_what_decodes_differently_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transload.formats.gptq import Gptq

    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32)))
    real = Gptq.encode

    def wrong(self: Gptq, name: str, w: QTensor) -> dict[str, torch.Tensor]:
        tensors = real(self, name, w)
        return {k: t.flip(0) if k.endswith("scales") else t for k, t in tensors.items()}

    monkeypatch.setattr(Gptq, "encode", wrong)
    with pytest.raises(FormatError, match=r"up_proj .* does not decode to what was meant"):
        transload.port(source, tmp_path / "b", "gptq")
    assert not (tmp_path / "b").exists()


class Killed(Exception):
    pass


def test_a_killed_port_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    weights = {f"model.layers.{i}.mlp.up_proj": random_weight(spec(4, 32), 32, 64, i) for i in range(8)}
    source = model(tmp_path / "a", weights)
    transload.port(source, tmp_path / "whole", "gptq")

    def kill(done: int, total: int, what: str) -> None:
        if "layers.5" in what:
            raise Killed

    with pytest.raises(Killed):
        transload.port(source, tmp_path / "b", "gptq", resume=True, progress=kill)
    assert not (tmp_path / "b").exists()
    with pytest.raises(ConfigError, match="different port"):
        transload.port(source, tmp_path / "b", "gptq_v2", resume=True)
    transload.port(source, tmp_path / "b", "gptq", resume=True)
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_broken_source_leaves_nothing_behind(tmp_path: Path) -> None:
    source = model(tmp_path / "a", module("mlp.up_proj", spec(4, 32)) | module("mlp.down_proj", spec(4, 32)))
    tensors = load_file(source / "model.safetensors")
    tensors[LAYER + "mlp.up_proj.scales"].fill_(float("nan"))
    MemorySource(tensors, json.loads((source / "config.json").read_text())).save(source)
    with pytest.raises(FormatError, match=r"up_proj.*NaN"):
        transload.port(source, tmp_path / "b", "gptq")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("to", ["transload", "bf16"])
def test_a_stack_that_stays_one_tensor_is_moved_expert_by_expert(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transload.formats.mx import GptOss

    name, g = "model.layers.0.mlp.experts.gate_up_proj", torch.Generator().manual_seed(0)
    stack = {
        f"{name}_blocks": torch.randint(0, 256, (4, 64, 2, 16), dtype=torch.uint8, generator=g),
        f"{name}_scales": torch.randint(120, 130, (4, 64, 2), dtype=torch.uint8, generator=g),
    }
    config = {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    source = MemorySource(stack | FLOATS, config).save(tmp_path / "a")
    whole = transload.open(source)[name]
    monkeypatch.setattr(GptOss, "decode", None)  # what would hold a byte for every code of the stack
    report = transload.port(source, tmp_path / "b", to)
    assert report.exact
    found = transload.open(tmp_path / "b")[name]
    assert isinstance(whole, QTensor)
    assert torch.equal(found.dequantize() if isinstance(found, QTensor) else found.float(), whole.dequantize())
    assert transload.verify(source, tmp_path / "b").equal
