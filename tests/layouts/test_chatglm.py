"""ChatGLM's own layout and transformers' `glm`: the same logits, the same bytes after a round trip, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import chatglm_oracle as chatglm
import pytest
import torch
from safetensors.torch import load_file, save_file

import transload
from transload.checkpoint import Checkpoint
from transload.errors import CannotHold, ConfigError, FormatError, TransloadError, Unsupported
from transload.formats import find_format
from transload.quant import PER_CHANNEL, Grid, QTensor, QuantSpec, Zero
from transload.reference import quantize_rtn
from transload.runtime import QuantLinear, report

FLOAT32 = 1e-4  # different orders of summation; logits are about 5
W4A16 = 1e-3
IDS = torch.tensor([3, 99, 7, 7, 41, 0, 127, 64, 18, 2, 55])
SPECS = {
    "gptq": QuantSpec(4, 32, zero=Zero.CODES, scale_dtype=torch.float16),
    "compressed-tensors": QuantSpec(4, 32, scale_dtype=torch.float16),
    "bitsandbytes": QuantSpec(4, 32, Grid.NF4, Zero.NONE),
    "awq": QuantSpec(4, 32, zero=Zero.CODES, scale_dtype=torch.float16),
}


def config(**changes: Any) -> dict[str, Any]:
    return chatglm.CONFIG | changes


def quantized(folder: Path, target: str, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A checkpoint with every linear of the encoder quantized; returns the float weights that its numbers mean."""
    format, spec = find_format(target), SPECS[target]
    stored: dict[str, torch.Tensor] = {}
    meant: dict[str, torch.Tensor] = {}
    specs: dict[str, QuantSpec] = {}
    for name, tensor in chatglm.weights(settings).items():
        meant[name] = stored[name] = tensor
        module = name.removesuffix(".weight")
        if tensor.dim() == 2 and "encoder" in name:
            del stored[name]
            w = nf4(tensor, spec) if spec.grid is Grid.NF4 else quantize_rtn(tensor, spec)
            stored |= format.encode(module, w)
            meant[name], specs[module] = w.dequantize(), w.spec
    floats = dict.fromkeys(("transformer.embedding.word_embeddings", "transformer.output_layer"), (128, 64))
    chatglm.write(folder, stored, settings | dict(format.finish(specs, floats)["config.json"]))
    return meant


def nf4(weight: torch.Tensor, spec: QuantSpec) -> QTensor:
    groups = weight.reshape(len(weight), -1, spec.group_size)
    scales = groups.abs().amax(-1)
    codes = (groups / scales.unsqueeze(-1)).unsqueeze(-1).sub(spec.grid.values(4)).abs().argmin(-1)
    return QTensor(spec, codes.to(torch.uint8).reshape(weight.shape), scales)


def own_logits(path: Path) -> torch.Tensor:
    with torch.no_grad():
        return transload.load(path, device="cpu")(IDS[None]).logits[0].float()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize(
    "settings",
    [
        config(),
        config(rope_ratio=1, padded_vocab_size=65024, num_layers=1, layernorm_epsilon=1e-5),
        config(multi_query_group_num=1),
        config(add_qkv_bias=False),
        config(multi_query_attention=False),
        config(kv_channels=32),
    ],
    ids=["glm-4-9b-chat", "chatglm2", "one-group", "no-bias", "every-head-its-own", "wide-heads"],
)
def test_a_float_checkpoint_gives_the_logits_of_the_definition(settings: dict[str, Any], tmp_path: Path) -> None:
    weights = chatglm.weights(settings)
    chatglm.write(tmp_path / "remote", weights, settings)
    want = chatglm.logits(weights, settings, IDS)
    assert close(own_logits(tmp_path / "remote"), want, FLOAT32)
    transload.port(tmp_path / "remote", tmp_path / "native", to="fp32", layout="native")
    assert json.loads((tmp_path / "native" / "config.json").read_text())["architectures"] == ["GlmForCausalLM"]
    assert close(own_logits(tmp_path / "native"), want, FLOAT32)


@pytest.mark.parametrize(("code", "divided"), [("base * self.rope_ratio", False), ("idx / self.rope_ratio", True)])
def test_the_code_beside_the_weights_tells_what_rope_ratio_means(code: str, divided: bool, tmp_path: Path) -> None:
    settings = config(rope_ratio=4, padded_vocab_size=65024, num_layers=1)
    weights = chatglm.weights(settings)
    folder = chatglm.write(tmp_path, weights, settings)
    with pytest.raises(Unsupported, match="rope_ratio 4 divides positions in ChatGLM2-6B-32K and widens the base"):
        transload.open(folder, layout="native")
    (folder / "modeling_chatglm.py").write_text(f"raise SystemExit('read, never run')\n# {code}\n")
    assert close(own_logits(folder), chatglm.logits(weights, settings, IDS, divide=divided), FLOAT32)
    assert not close(own_logits(folder), chatglm.logits(weights, settings, IDS, divide=not divided), 100 * FLOAT32)


@pytest.mark.parametrize("target", SPECS)
def test_a_quantized_checkpoint_runs_and_is_ported_without_remote_code(target: str, tmp_path: Path) -> None:
    want = chatglm.logits(quantized(tmp_path / "remote", target, config()), config(), IDS)
    model = transload.load(tmp_path / "remote", device="cpu")
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} == {QuantLinear}
    assert len(report(model).modules) == 12
    with torch.no_grad():
        assert close(model(IDS[None]).logits[0], want, W4A16)
    done = transload.port(tmp_path / "remote", tmp_path / "native", to=target, layout="native")
    assert done.exact
    assert any("GlmForCausalLM" in note for note in done.notes)
    assert close(own_logits(tmp_path / "native"), want, W4A16)
    assert transload.verify(tmp_path / "remote", tmp_path / "native").equal


def test_a_folder_as_autogptq_saves_it_is_loaded(tmp_path: Path) -> None:
    want = chatglm.logits(quantized(tmp_path, "gptq", config()), config(), IDS)
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    declared = settings.pop("quantization_config")
    kept = ("bits", "group_size", "desc_act", "sym")
    old = {key: declared[key] for key in kept} | {"damp_percent": 0.01, "true_sequential": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(old))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert close(own_logits(tmp_path), want, W4A16)


@pytest.mark.parametrize("target", [*SPECS, "fp32"])
def test_a_round_trip_gives_the_same_bytes(target: str, tmp_path: Path) -> None:
    remote, native, again = tmp_path / "remote", tmp_path / "native", tmp_path / "again"
    if target == "fp32":
        chatglm.write(remote, chatglm.weights(config()), config())
    else:
        quantized(remote, target, config())
    transload.port(remote, native, to=target, layout="native")
    transload.port(native, again, to=target, layout="remote")
    before, after = load_file(remote / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype, name
        assert torch.equal(tensor, after[name]), name
    settings = json.loads((again / "config.json").read_text())
    kept = {key: settings[key] for key in chatglm.CONFIG if key not in ("architectures", "torch_dtype")}
    assert kept == {key: chatglm.CONFIG[key] for key in kept}


def test_a_fused_module_moves_without_being_unpacked(tmp_path: Path) -> None:
    quantized(tmp_path / "remote", "gptq", config())
    native = transload.open(tmp_path / "remote", layout="native")
    stored = transload.open(tmp_path / "remote")
    whole = stored["transformer.encoder.layers.0.self_attention.query_key_value"]
    assert isinstance(whole, QTensor)
    for name, first, last in (("q_proj", 0, 64), ("k_proj", 64, 96), ("v_proj", 96, 128)):
        entry = native.entry(f"model.layers.0.self_attn.{name}")
        rows = native.format.packed(native.source, entry)
        assert rows is not None
        assert rows.unpacked().equal(whole.rows(first, last))
        assert native.decode(entry).equal(whole.rows(first, last))
    assert sum(e.stored_bytes for e in native.entries.values()) == sum(
        e.stored_bytes for e in stored.entries.values() if "inv_freq" not in e.name
    )


def test_a_cut_module_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(tmp_path / "remote", "gptq", config())
    native = transload.open(tmp_path / "remote", layout="native")
    read: list[str] = []
    original = native.source.read
    monkeypatch.setattr(native.source, "read", lambda name: read.append(name) or original(name))
    for part in "qkv":
        native[f"model.layers.1.self_attn.{part}_proj"]
    assert read.count("transformer.encoder.layers.1.self_attention.query_key_value.qweight") == 1


def test_biases_of_zeros_that_gptq_tools_store_are_left_out_and_named(tmp_path: Path) -> None:
    weights = chatglm.weights(config())
    name = "transformer.encoder.layers.0.self_attention.dense.bias"
    chatglm.write(tmp_path / "zero", weights | {name: torch.zeros(64)}, config())
    native = transload.open(tmp_path / "zero", layout="native")
    assert any(name in note for note in native.notes())
    assert "model.layers.0.self_attn.o_proj.bias" not in native
    chatglm.write(tmp_path / "one", weights | {name: torch.ones(64)}, config())
    with pytest.raises(FormatError, match=r"is not zero, and model\.layers\.0\.self_attn\.o_proj has no bias"):
        transload.open(tmp_path / "one", layout="native")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"position_encoding_2d": True}, "first generation"),
        ({"rmsnorm": False}, "LayerNorm"),
        ({"post_layer_norm": False}, "no norm after the last layer"),
        ({"original_rope": False}, "rotates halves"),
        ({"apply_residual_connection_post_layernorm": True}, "residuals start after the norm"),
        ({"add_bias_linear": True}, "every linear of it has a bias"),
        ({"pre_seq_len": 128}, "P-tuning"),
        ({"vision_config": {"hidden_size": 8}}, "vision tower"),
        ({"quantization_bit": 4}, "ChatGLM's own quantization"),
        ({"kv_channels": 18}, "no whole number of pairs"),
        ({"num_layers": 1}, "no place for 7 stored tensors: 'transformer.encoder.layers.1"),
        ({"num_layers": 3}, "'transformer.encoder.layers.2.*' is missing"),
        ({"num_attention_heads": 3}, "128 rows, config.json says"),
        ({"multi_query_group_num": 4}, "expected at least 192 rows"),
        ({"num_layers": -1}, "'num_layers' is -1"),
        ({"hidden_size": 32}, "64 rows, config.json says 32"),
        ({"ffn_hidden_size": 48}, "192 rows, config.json says 96"),
        ({"padded_vocab_size": 100}, "128 rows, config.json says 100"),
        ({"layernorm_epsilon": "tiny"}, "rms_norm_eps"),
        ({"hidden_size": "64"}, "'hidden_size' is '64'"),
        ({"rope_ratio": "500"}, "'rope_ratio' is '500'"),
        ({"rope_ratio": float("nan")}, "'rope_ratio' is nan"),
        ({"num_attention_heads": 1 << 30, "multi_query_attention": False}, "1073741824 heads"),
    ],
)
def test_a_model_that_glm_does_not_compute_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    chatglm.write(tmp_path, chatglm.weights(config()), config(**changes))
    with pytest.raises(TransloadError, match=reason) as failed:
        transload.load(tmp_path, device="cpu")
    assert str(tmp_path) in str(failed.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "glm4"}, "two more norms in every layer"),
        ({"model_type": "llama"}, "the layout belongs to 'glm'"),
        ({"partial_rotary_factor": 1.0}, "another part of a head"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "activation is gelu"),
        ({"tie_word_embeddings": True}, "tied"),
    ],
)
def test_a_model_that_chatglm_does_not_compute_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    settings = native_config(tmp_path) | changes
    (tmp_path / "native" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(Unsupported, match=reason):
        transload.open(tmp_path / "native", layout="remote")


def native_config(folder: Path) -> dict[str, Any]:
    chatglm.write(folder / "remote", chatglm.weights(config()), config())
    transload.port(folder / "remote", folder / "native", to="fp32", layout="native")
    settings: dict[str, Any] = json.loads((folder / "native" / "config.json").read_text())
    return settings


def test_members_of_different_schemes_are_not_fused(tmp_path: Path) -> None:
    quantized(tmp_path / "remote", "compressed-tensors", config())
    transload.port(tmp_path / "remote", tmp_path / "native", to="compressed-tensors", layout="native")
    file = tmp_path / "native" / "model.safetensors"
    tensors = load_file(file)
    spec = QuantSpec(4, PER_CHANNEL, scale_dtype=torch.float16)
    name = "model.layers.1.self_attn.k_proj"
    w = quantize_rtn(torch.randn(32, 64), spec)
    save_file(tensors | find_format("compressed-tensors").encode(name, w), file)
    settings = json.loads((tmp_path / "native" / "config.json").read_text())
    groups = settings["quantization_config"]["config_groups"]
    one = next(iter(groups.values()))
    groups["other"] = one | {"targets": [name], "weights": one["weights"] | {"strategy": "channel", "group_size": None}}
    (tmp_path / "native" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CannotHold, match="query_key_value is one fused module in this layout, and its members differ"):
        transload.open(tmp_path / "native", layout="remote")


def test_act_order_moves_with_the_rows_and_is_joined_only_where_members_share_it(tmp_path: Path) -> None:
    quantized(tmp_path / "remote", "gptq", config(num_layers=1))
    file = tmp_path / "remote" / "model.safetensors"
    order = torch.arange(64).flip(0) // 32
    tensors = load_file(file)
    mixed = {n: order.int() for n, t in tensors.items() if n.endswith("query_key_value.g_idx")}
    save_file(tensors | mixed, file)
    settings = json.loads((tmp_path / "remote" / "config.json").read_text())
    settings["quantization_config"]["desc_act"] = True
    (tmp_path / "remote" / "config.json").write_text(json.dumps(settings))
    transload.port(tmp_path / "remote", tmp_path / "native", to="gptq", layout="native")
    w = transload.open(tmp_path / "native")["model.layers.0.self_attn.k_proj"]
    assert isinstance(w, QTensor)
    assert w.group_of_k().equal(order)
    transload.port(tmp_path / "native", tmp_path / "again", to="gptq", layout="remote")
    assert transload.verify(tmp_path / "remote", tmp_path / "again").equal

    file = tmp_path / "native" / "model.safetensors"
    name = "model.layers.0.self_attn.k_proj.g_idx"
    save_file(load_file(file) | {name: (torch.arange(64) % 2).int()}, file)
    with pytest.raises(CannotHold, match="the act-order of its members differs"):
        transload.open(tmp_path / "native", layout="remote")


def test_an_unknown_layout_is_refused_by_name(tmp_path: Path) -> None:
    chatglm.write(tmp_path, chatglm.weights(config()), config())
    with pytest.raises(ConfigError, match="layout 'hf': give one of stored, native, remote"):
        transload.open(tmp_path, layout="hf")


def test_a_float_checkpoint_is_quantized_on_load(tmp_path: Path) -> None:
    chatglm.write(tmp_path, chatglm.weights(config()), config())
    model = transload.load(tmp_path, device="cpu", bits=4)
    assert {type(m) for n, m in model.named_modules() if n.endswith("_proj")} == {QuantLinear}


def test_the_stored_layout_says_that_another_exists(tmp_path: Path) -> None:
    checkpoint = transload.open(chatglm.write(tmp_path, chatglm.weights(config()), config()))
    assert isinstance(checkpoint, Checkpoint)
    assert any("--layout native" in note for note in checkpoint.notes())
    assert any("--layout native" in note for note in transload.inspect(tmp_path).notes)
    assert "transformer.output_layer" in checkpoint


def test_a_layout_is_quantized_through_the_native_class(tmp_path: Path) -> None:
    source = chatglm.write(tmp_path / "remote", chatglm.weights(config()), config())
    (tmp_path / "recipe.yaml").write_text(
        "{name: small, rules: [{modules: ['*'], scheme: int8-g32}], calibration: {tokens: 32}}"
    )
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 8)
    settings = {"to": "compressed-tensors", "calibration": tmp_path / "text.txt", "tokenizer": _Letters()}
    report = transload.quantize(source, tmp_path / "int8", tmp_path / "recipe.yaml", **settings)
    assert any("GlmForCausalLM" in note for note in report.notes)
    want = chatglm.logits(chatglm.weights(config()), config(), IDS)
    assert close(own_logits(tmp_path / "int8"), want, 0.05)


class _Letters:
    """A tokenizer for a vocabulary of 128: a letter is its code."""

    def __call__(self, text: str, **unused: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 128 for letter in text]}
