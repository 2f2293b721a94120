"""What goes wrong when others move checkpoints to Ascend, as tests of a port. docs/ascend.md lists all of them.

The source is a cut msModelSlim checkpoint with additions that tools are known to lose: a buffer, a float32 layer of
multi-token prediction, and a tokenizer.model.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import transload
from transload.engines import VLLM_ASCEND_023, VLLM_ASCEND_MAIN, Layer
from transload.formats import FORMATS
from transload.quant import PER_CHANNEL, ActSpec, QuantSpec
from transload.reference import quantize_rtn

GOLDEN = Path(__file__).parents[1] / "golden" / "msmodelslim_w4a8"
DESCRIPTION = "quant_model_description.json"
RELEASES = ["vllm-ascend==0.23", "vllm-ascend==main"]
CONFIG = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 1, "hidden_size": 256,
    "moe_intermediate_size": 128, "num_experts": 1, "torch_dtype": "bfloat16",
}  # fmt: skip
ADDED = {
    "model.layers.0.mlp.gate.e_score_correction_bias": torch.arange(4.0),
    "model.layers.1.eh_proj.weight": torch.ones(8, 16),
    "lm_head.weight": torch.ones(8, 256, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pitfalls") / "source"
    folder.mkdir()
    save_file(load_file(GOLDEN / "quant_model_weights.safetensors") | ADDED, folder / "quant_model_weights.safetensors")
    description = json.loads((GOLDEN / DESCRIPTION).read_text()) | dict.fromkeys(ADDED, "FLOAT")
    (folder / DESCRIPTION).write_text(json.dumps(description))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.model").write_bytes(b"sentencepiece")
    return folder


@pytest.fixture(scope="module", params=RELEASES)
def ported(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pitfalls") / "ported"
    transload.port(source, folder, to=request.param)
    return folder


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def _description(folder: Path) -> dict[str, object]:
    return dict(json.loads((folder / DESCRIPTION).read_text()))


def test_e02_dense_w4a8_runs_as_w4a16_on_023_and_is_refused_for_main() -> None:
    layer = Layer(QuantSpec(4, 128, act=ActSpec()))
    rule = VLLM_ASCEND_023.covers("msmodelslim", layer)
    assert not isinstance(rule, str)
    assert rule.executed == "W4A16"
    assert isinstance(VLLM_ASCEND_MAIN.covers("msmodelslim", layer), str)
    assert isinstance(VLLM_ASCEND_MAIN.covers("msmodelslim", Layer(QuantSpec(4, 128))), str)


def test_e03_w4a8_experts_per_group_are_refused_for_main() -> None:
    reason = VLLM_ASCEND_MAIN.covers("msmodelslim", Layer(QuantSpec(4, 128, act=ActSpec()), experts=True))
    assert isinstance(reason, str)
    assert "group size" in reason


def test_e04_every_stored_tensor_is_described(ported: Path) -> None:
    described = {name for name in _description(ported) if "." in name}
    assert described == set(_tensors(ported))


def test_e08_the_type_is_said_tensor_by_tensor(ported: Path) -> None:
    description = _description(ported)
    assert description["model_quant_type"] == "W8A8_DYNAMIC"  # what the tool writes for a mixed model
    assert description["model.layers.0.mlp.experts.0.down_proj.weight"] == "W4A8_DYNAMIC"
    assert description["model.layers.0.self_attn.q_proj.weight"] == "W8A8_DYNAMIC"


def test_e09_buffers_come_along(ported: Path) -> None:
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    assert torch.equal(_tensors(ported)[name], ADDED[name])
    assert _description(ported)[name] == "FLOAT"


def test_e10_float_tensors_keep_their_dtype_and_mtp_layers_are_described(ported: Path) -> None:
    for name in ("model.layers.1.eh_proj.weight", "lm_head.weight"):
        assert _tensors(ported)[name].dtype == ADDED[name].dtype
        assert _description(ported)[name] == "FLOAT"


def test_e11_tokenizer_model_comes_along(ported: Path) -> None:
    assert (ported / "tokenizer.model").read_bytes() == b"sentencepiece"


def test_e13_scale_bias_is_written_in_16_parts_for_row_parallel_layers(ported: Path) -> None:
    tensors, original = _tensors(ported), load_file(GOLDEN / "quant_model_weights.safetensors")
    for part, columns in (("gate_proj", 1), ("up_proj", 1), ("down_proj", 16)):
        name = f"model.layers.0.mlp.experts.0.{part}.scale_bias"
        assert tensors[name].shape[1] == columns
        assert torch.equal(tensors[name], original[name])


def test_e13_k_that_has_no_16_parts_is_refused() -> None:
    reason = _format("msmodelslim").cannot_hold(QuantSpec(4, PER_CHANNEL, act=ActSpec()), (64, 24))
    assert reason is not None
    assert "16 parts" in reason


def test_e14_offset_binary_becomes_twos_complement() -> None:
    w = quantize_rtn(torch.linspace(-1, 1, 64 * 64).reshape(64, 64), QuantSpec(4, 64))
    theirs = _format("compressed-tensors").encode("m", w)["m.weight_packed"]
    ours = _format("msmodelslim").encode("m", w)["m.weight"]
    offset_binary = int(theirs[0, 0]) & 15  # row 0, column 0
    twos_complement = int(ours[0, 0]) & 15  # rows 0 and 1 share a byte
    assert offset_binary == int(w.codes[0, 0]) != twos_complement
    assert twos_complement == offset_binary ^ 8


def test_e16_static_w8a8_has_offset_zero_and_its_bias_in_steps_of_the_integer_sums() -> None:
    """The engine holds input_offset as int8, and adds quant_bias on one rank alone: both are as it wants them."""
    static = QuantSpec(8, PER_CHANNEL, act=ActSpec(static=True))
    format = _format("msmodelslim")
    assert format.cannot_hold(static, (64, 64)) is None
    assert "8 bits" in str(format.cannot_hold(QuantSpec(4, PER_CHANNEL, act=ActSpec(static=True)), (64, 64)))
    scales, step, bias = torch.rand(64, 1) + 0.1, torch.tensor([0.25]), torch.randn(64) * 30
    made = format.calibrated("m", scales, step, bias, "bfloat16")
    assert made["m.input_offset"].tolist() == [0.0]
    assert torch.equal(made["m.deq_scale"], step * scales[:, 0])
    assert (
        float((made["m.quant_bias"] * made["m.deq_scale"] - bias).abs().max()) <= float(made["m.deq_scale"].max()) / 2
    )
    bits = format.calibrated("m", scales, step, bias, "float16")["m.deq_scale"]
    assert torch.equal(bits.to(torch.int32).view(torch.float32), made["m.deq_scale"])


def test_e22_files_can_be_read_by_the_server_that_loads_them(ported: Path) -> None:
    for file in ported.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) & 0o444 == 0o444, file


@pytest.mark.parametrize("release", RELEASES)
def test_awq_and_gptq_are_not_promised_to_an_engine_that_does_not_load_them(release: str) -> None:
    engine = VLLM_ASCEND_023 if release.endswith("0.23") else VLLM_ASCEND_MAIN
    for name in ("awq", "gptq"):
        reason = engine.covers(name, Layer(QuantSpec(4, 128)))
        assert isinstance(reason, str)
        assert f"not {name}" in reason


def _format(name: str):  # type: ignore[no-untyped-def]
    return next(f for f in FORMATS if f.name == name)
