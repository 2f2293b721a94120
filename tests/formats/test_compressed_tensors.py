"""compressed-tensors against its library's files, and its own corner cases."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import broken, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource, decoded, golden, only, random_weight, written

from transload.errors import FormatError, Unsupported
from transload.formats.compressed_tensors import BITS, CompressedTensors
from transload.formats.gptq import GptqV2
from transload.quant import ActSpec, Grid, QuantSpec, Zero

MODULE = "model.layers.0.mlp.up_proj"
CT = CompressedTensors()
WRITTEN = (
    "ct_pack_w4a16_sym_g128",
    "ct_pack_w4_asym_g40",
    "ct_pack_w8_channel",
    "ct_int_w4a8_sym_g128",
    "ct_int_w8a8_channel",
)
READ = (
    "ct_pack_w3_asym_g32",
    "ct_pack_w5_asym_g32",
    "ct_pack_w3_asym_g32_filled",
    "ct_pack_w5_asym_g32_filled",
    "ct_float_block",
)


def spec(b: int, group: int, zero: Zero = Zero.MIDPOINT, act: bool = False) -> QuantSpec:
    return QuantSpec(b, group, zero=zero, scale_dtype=torch.bfloat16, act=ActSpec() if act else None)


def config(source: MemorySource) -> dict[str, Any]:
    found = source.config["quantization_config"]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", WRITTEN + READ)
def test_golden_files_decode_exactly(name: str) -> None:
    source, tensors = golden(name)
    _, w = only(CT, source)
    # The library multiplies in the dtype of its scales.
    assert torch.equal(w.dequantize(w.spec.scale_dtype).float(), tensors["dequant"])


@pytest.mark.parametrize("name", WRITTEN)
def test_golden_files_encode_to_the_same_bytes(name: str) -> None:
    source, _ = golden(name)
    _, w = only(CT, source)
    made = CT.encode(MODULE, w)
    assert made.keys() == source.tensors.keys()
    for part, t in made.items():
        assert torch.equal(t, source.tensors[part]), part


@pytest.mark.parametrize("name", READ)
def test_what_is_only_read_is_refused_with_a_reason(name: str) -> None:
    entry, w = only(CT, golden(name)[0])
    assert CT.cannot_hold(w.spec, entry.shape)


def test_the_worked_word_of_the_docstring() -> None:
    w = random_weight(spec(4, -1), 1, 8)
    w.codes[:] = torch.tensor([5, 5, 7, 7, 10, 10, 7, 3])
    assert int(CT.encode(MODULE, w)[f"{MODULE}.weight_packed"]) == 0x37AA7755
    signed = CT.encode(MODULE, w.with_act(ActSpec()))[f"{MODULE}.weight"]
    assert signed.tolist() == [[-3, -3, -1, -1, 2, 2, -1, -5]]


@pytest.mark.parametrize("b", BITS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_shape_group_and_zero_point_round_trips(b: int, data: st.DataObject) -> None:
    n, group = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([-1, 1, 8, 32, 40]))
    k = data.draw(st.integers(1, 150)) if group == -1 else group * data.draw(st.integers(2, 5))
    zero = data.draw(st.sampled_from([Zero.CODES, Zero.MIDPOINT]))
    act = b != 2 and data.draw(st.booleans())
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    made = QuantSpec(b, group, zero=zero, scale_dtype=dtype, act=ActSpec() if act else None)
    w = random_weight(made, n, k, k)
    assert only(CT, written(CT, {MODULE: w}))[1].equal(w)


@pytest.mark.parametrize("zero", [Zero.MIDPOINT, Zero.CODES])
@pytest.mark.parametrize("b", BITS)
def test_words_that_stay_packed_make_the_same_bytes(b: int, zero: Zero) -> None:
    w = random_weight(spec(b, 32, zero), 24, 96)
    source = written(CT, {MODULE: w})
    (entry,) = CT.entries(source).values()
    rows = CT.packed(source, entry)
    assert rows is not None
    assert rows.unpacked().equal(w)
    again = CT.encode_packed(MODULE, rows)
    assert again is not None
    assert again.keys() == source.tensors.keys()
    assert all(torch.equal(t, source.tensors[name]) for name, t in again.items())


def test_gptqs_words_are_ours_transposed() -> None:
    w = random_weight(QuantSpec(4, 32, zero=Zero.CODES, scale_dtype=torch.float16), 24, 96)
    source = written(GptqV2(), {MODULE: w})
    (entry,) = GptqV2().entries(source).values()
    rows = GptqV2().packed(source, entry)
    assert rows is not None
    made = CT.encode_packed(MODULE, rows)
    assert made is not None
    assert all(torch.equal(t, made[name]) for name, t in CT.encode(MODULE, w).items())
    assert torch.equal(made[f"{MODULE}.weight_packed"], source.tensors[f"{MODULE}.qweight"].T)


@pytest.mark.parametrize("made", [spec(8, -1, act=True), QuantSpec(8, -1, Grid.E4M3, Zero.NONE)], ids=str)
def test_codes_in_bytes_have_no_words(made: QuantSpec) -> None:
    w = random_weight(made, 8, 32)
    w.codes[w.codes == 127] = 0
    source = written(CT, {MODULE: w})
    (entry,) = CT.entries(source).values()
    assert CT.packed(source, entry) is None


def test_mixed_schemes_become_config_groups_that_read_back() -> None:
    weights = {
        "model.layers.0.self_attn.q_proj": random_weight(spec(4, 32), 16, 64),
        "model.layers.1.self_attn.q_proj": random_weight(spec(4, 32), 16, 64, 1),
        "model.layers.0.mlp.down_proj": random_weight(spec(8, -1, act=True), 16, 64),
        "model.layers.1.mlp.down_proj": random_weight(spec(4, 16, Zero.CODES), 16, 64, 2),
        "lm_head": random_weight(spec(8, 64 // 2), 16, 64),
    }
    source = written(CT, weights, {"model.layers.0.mlp.gate": (4, 64), "model.layers.1.mlp.gate": (4, 64)})
    found = decoded(CT, source)
    assert found.keys() == weights.keys()
    assert all(found[m].equal(w) for m, w in weights.items())
    made = config(source)
    assert made["format"] == "mixed-precision"
    assert made["ignore"] == [r"re:^model\.layers\.\d+\.mlp\.gate$"]
    assert next(iter(made["config_groups"].values()))["targets"] == ["Linear"]
    assert any("lm_head" in g["targets"] for g in made["config_groups"].values())


def test_a_head_in_float_is_ignored_and_fused_names_match() -> None:
    weights = {f"model.layers.0.mlp.{m}": random_weight(spec(8, 32), 8, 32) for m in ("gate_proj", "up_proj")}
    weights |= {f"model.layers.{i}.mlp.down_proj": random_weight(spec(4, 32), 8, 32) for i in range(3)}
    floats = {f"model.layers.0.self_attn.{m}": (8, 32) for m in ("q_proj", "k_proj", "v_proj")}
    made = config(written(CT, weights, floats))
    assert made["ignore"][-1] == "lm_head"
    assert any(re.match(t[3:], "model.layers.0.self_attn.qkv_proj") for t in made["ignore"] if t.startswith("re:"))
    (eight,) = [g for g in made["config_groups"].values() if g["weights"]["num_bits"] == 8]
    assert any(re.match(t[3:], "model.layers.0.mlp.gate_up_proj") for t in eight["targets"])


def test_exact_targets_win_over_expressions_and_those_over_classes() -> None:
    w = random_weight(spec(4, 32), 8, 64)
    source = written(CT, {MODULE: w})
    right = config(source)["config_groups"]["group_0"]
    wrong = right | {"weights": right["weights"] | {"num_bits": 8}}
    for targets, others in (([MODULE], ["re:.*up_proj"]), (["re:.*up_proj"], ["Linear"])):
        groups = {"a": wrong | {"targets": others}, "b": right | {"targets": targets}}
        mixed = MemorySource(source.tensors, {"quantization_config": config(source) | {"config_groups": groups}})
        assert only(CT, mixed)[1].equal(w)


def test_fp8_per_channel_round_trips() -> None:
    made = QuantSpec(8, -1, Grid.E4M3, Zero.NONE, torch.float32)
    w = random_weight(made, 8, 40)
    w.codes[w.codes % 128 == 127] = 0  # NaN
    assert only(CT, written(CT, {MODULE: w}))[1].equal(w)


def test_the_act_order_of_older_files_reads() -> None:
    w = random_weight(QuantSpec(4, 16, scale_dtype=torch.bfloat16, act_order=True), 8, 64)
    assert "act-order" in (CT.cannot_hold(w.spec, (8, 64)) or "")
    plain = random_weight(spec(4, 16), 8, 64)
    source = written(CT, {MODULE: plain})
    group = config(source)["config_groups"]["group_0"]
    group["weights"]["actorder"] = "group"
    assert w.g_idx is not None
    ordered = MemorySource(source.tensors | {f"{MODULE}.weight_g_idx": w.g_idx}, source.config)
    found = only(CT, ordered)[1]
    assert found.spec.act_order
    assert torch.equal(found.g_idx, w.g_idx)


def test_a_static_input_scale_is_carried_as_a_tensor() -> None:
    source = written(CT, {MODULE: random_weight(spec(8, -1, act=True), 8, 64)})
    group = config(source)["config_groups"]["group_0"]
    group["input_activations"] |= {"dynamic": False, "strategy": "tensor"}
    static = MemorySource(source.tensors | {f"{MODULE}.input_scale": torch.ones(1)}, source.config)
    entries = CT.entries(static)
    assert f"{MODULE}.input_scale" in entries
    act = entries[MODULE].spec and entries[MODULE].spec.act
    assert act
    assert act.static


@pytest.mark.parametrize(
    ("made", "shape", "says"),
    [
        (QuantSpec(4, 32, zero=Zero.MINS), (8, 64), "no float minimum"),
        (QuantSpec(4, 32, zero=Zero.FLOATS), (8, 64), "zero points as midpoint or codes, not floats"),
        (QuantSpec(5, 32), (8, 64), "codes of 2, 4 or 8 bits, not 5"),
        (QuantSpec(4, 48), (8, 64), "K=64 is not a multiple of 48"),
        (QuantSpec(4, 32), (3, 8, 64), "split the experts"),
        (QuantSpec(4, 64, Grid.NF4, Zero.NONE), (8, 64), "not nf4"),
        (QuantSpec(4, -1, act=ActSpec(static=True)), (8, 64), "static"),
    ],
    ids=lambda v: str(v) if isinstance(v, QuantSpec) else None,
)
def test_refusals_say_why(made: QuantSpec, shape: tuple[int, ...], says: str) -> None:
    assert says in (CT.cannot_hold(made, shape) or "")


def replaced(part: str, t: torch.Tensor) -> MemorySource:
    source = written(CT, {MODULE: random_weight(spec(4, 32, Zero.CODES), 8, 64)})
    return MemorySource(source.tensors | {f"{MODULE}.{part}": t}, source.config)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (replaced("weight_shape", torch.tensor([8, 640])), "which 4-bit codes in words"),
        (replaced("weight_scale", torch.ones(8, 3)), "expected \\(8, 2\\) for group scales"),
        (replaced("weight_scale", torch.full((8, 2), torch.inf)), "up_proj: .*NaN or infinity"),
        (replaced("weight_zero_point", torch.zeros(2, 2, dtype=torch.int32)), "expected \\(1, 2\\)"),
        (replaced("weight_packed", torch.zeros(8, 0, dtype=torch.int32)), "no elements"),
    ],
    ids=["shape", "groups", "infinite", "zeros", "empty"],
)
def test_contradictions_name_the_tensor(source: MemorySource, says: str) -> None:
    with pytest.raises(FormatError, match=says):
        only(CT, source)


def test_what_is_not_read_says_so() -> None:
    source = written(CT, {MODULE: random_weight(spec(4, 32), 8, 64)})
    for change in ({"sparsity_config": {"format": "x"}}, {"format": "marlin-24"}):
        changed = MemorySource(source.tensors, {"quantization_config": config(source) | change})
        for group in config(changed)["config_groups"].values():
            group.pop("format", None)
        with pytest.raises(Unsupported, match=r"memory: .*not read"):
            CT.entries(changed)


@pytest.mark.parametrize("which", ["ct_pack_w4_asym_g40", "ct_int_w8a8_channel", "ct_float_block"])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_broken_checkpoints_are_refused_by_name(which: str, data: st.DataObject) -> None:
    survives(CT, data.draw(broken(golden(which)[0])))


def test_a_folder_opens(tmp_path: Path) -> None:
    import transload

    w = random_weight(spec(4, 32), 8, 64)
    found = transload.open(written(CT, {MODULE: w}, {"lm_head": (4, 64)}).save(tmp_path / "m"))
    assert found.format.name == "compressed-tensors"
    assert found.modules() == {MODULE: w.spec, "lm_head": None}
