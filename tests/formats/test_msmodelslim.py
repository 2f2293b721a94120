"""msModelSlim against the tool's own files: names, shapes, dtypes, bytes and numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hostile import broken, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import GOLDEN, MemorySource, decoded, only, random_weight, written
from safetensors.torch import load_file

import transload
from transload.errors import CannotHold, TransloadError
from transload.formats import msmodelslim_layouts as layouts
from transload.formats.msmodelslim import DESCRIPTION, MsModelSlim
from transload.quant import ActSpec, QTensor, QuantSpec, Zero
from transload.reference import quantize_rtn

FMT = MsModelSlim()
DOWN, GATE = "model.layers.0.mlp.experts.0.down_proj", "model.layers.0.mlp.experts.0.gate_proj"
DYNAMIC = ActSpec()
W4A8, W8A8 = QuantSpec(4, -1, act=DYNAMIC), QuantSpec(8, -1, act=DYNAMIC)


def tool(folder: str) -> MemorySource:
    tensors = load_file(GOLDEN / folder / "quant_model_weights.safetensors")
    return MemorySource(tensors, {}, {DESCRIPTION: json.loads((GOLDEN / folder / DESCRIPTION).read_text())})


@pytest.mark.parametrize("folder", ["msmodelslim_w4a8", "msmodelslim_v0_w4a16_g64"])
def test_the_tools_files_decode_and_encode_to_the_same_bytes(folder: str) -> None:
    source = tool(folder)
    found = decoded(FMT, source)
    assert found
    for name, w in found.items():
        for part, t in FMT.encode(name, w).items():
            assert t.dtype == source.tensors[part].dtype
            assert torch.equal(t, source.tensors[part]), part


def test_the_tools_weights_approximate_the_float_model() -> None:
    floats = load_file(GOLDEN / "msmodelslim_w4a8.float.safetensors")
    for name, w in decoded(FMT, tool("msmodelslim_w4a8")).items():
        x = floats[f"{name}.weight"].float()
        error = float((w.dequantize() - x).norm() / x.norm())
        assert error < (0.12 if w.spec.bits == 4 else 0.01), name  # random normal weights, 16 or 256 levels a row


def test_quantized_by_us_the_model_has_the_tools_names_shapes_dtypes_and_types() -> None:
    theirs = tool("msmodelslim_w4a8")
    floats = load_file(GOLDEN / "msmodelslim_w4a8.float.safetensors")
    weights, worst = {}, 0.0
    for name, w in decoded(FMT, theirs).items():
        x = floats[f"{name}.weight"].float()
        weights[name] = quantize_rtn(x, w.spec)
        ours, tools = ((q.dequantize() - x).norm() / x.norm() for q in (weights[name], w))
        worst = max(worst, float(ours / tools))
    assert worst < 1.1  # the tool searches scales (ssz) where this is plain rounding
    carried = [n for n in floats if n.removesuffix(".weight") not in weights]
    ours_files = FMT.describe({n: w.spec for n, w in weights.items()}, carried)[DESCRIPTION]
    ours_tensors = {k: t for n, w in weights.items() for k, t in FMT.encode(n, w).items()} | {
        k: floats[k] for k in carried
    }
    assert {k: (t.dtype, t.shape) for k, t in ours_tensors.items()} == {
        k: (t.dtype, t.shape) for k, t in theirs.tensors.items()
    }
    assert ours_files == theirs.files[DESCRIPTION]


def test_scale_bias_is_8_times_the_sum_of_the_dequantized_weight() -> None:
    w = random_weight(W4A8, 6, 64)
    per_row, per_chunk = (FMT.encode(name, w)[f"{name}.scale_bias"] for name in (GATE, DOWN))
    exact = 8 * w.dequantize().double().sum(1, keepdim=True)
    assert per_row.shape == (6, 1)
    assert per_chunk.shape == (6, 16)
    for stored in (per_row.double(), per_chunk.double().sum(1, keepdim=True)):
        assert torch.allclose(stored, exact, rtol=1e-5, atol=1e-4)


def test_rows_3_and_minus_1_share_the_byte_0xf3() -> None:
    assert layouts.pack_rows(torch.tensor([[11], [7]], dtype=torch.uint8)).view(torch.uint8).item() == 0xF3
    assert layouts.unpack_rows(torch.tensor([[-13]], dtype=torch.int8)).flatten().tolist() == [11, 7]


SPECS = [
    W4A8,
    W8A8,
    QuantSpec(4, 32, act=DYNAMIC),
    QuantSpec(4, 32),
    QuantSpec(4, -1, zero=Zero.CODES),
    QuantSpec(4, 32, zero=Zero.CODES),
    QuantSpec(8, -1),
    QuantSpec(8, 16, zero=Zero.CODES),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@given(n=st.integers(1, 9), groups=st.integers(2, 5))
@settings(max_examples=10, deadline=None)
def test_any_aligned_shape_round_trips(spec: QuantSpec, n: int, groups: int) -> None:
    w = random_weight(spec, 2 * n, 32 * groups, n)
    entry, found = only(FMT, written(FMT, {DOWN: w}))
    assert entry.spec == spec
    assert found.equal(w)


def test_a_mixed_model_lists_every_tensor() -> None:
    source = written(
        FMT, {GATE: random_weight(W4A8, 4, 32), "model.layers.0.self_attn.q_proj": random_weight(W8A8, 4, 32)}
    )
    source = MemorySource(source.tensors | {"model.norm.weight": torch.ones(4)}, {}, source.files)
    specs = {n: w.spec for n, w in decoded(FMT, source).items()}
    described = FMT.describe(specs, ["model.norm.weight"])[DESCRIPTION]
    assert source.tensors.keys() <= described.keys()
    assert described["model.norm.weight"] == "FLOAT"
    assert described[f"{GATE}.scale_bias"] == "W4A8_DYNAMIC"
    assert described["model_quant_type"] == "W8A8_DYNAMIC"
    assert described["group_size"] == 0


def test_groups_of_two_sizes_are_refused_together() -> None:
    specs = {GATE: W4A8, DOWN: QuantSpec(4, 64, act=DYNAMIC)}
    with pytest.raises(CannotHold, match=r"per channel .*gate_proj.*, 64 .*down_proj"):
        FMT.finish(specs, {})


def older(version: bool, **tensors: torch.Tensor) -> MemorySource:
    """One W4A8_DYNAMIC module as the first saver lays it out."""
    stored = {f"{GATE}.{k}": t for k, t in tensors.items()}
    description = dict.fromkeys(stored, "W4A8_DYNAMIC") | ({"version": "1.0.0", "group_size": 8} if version else {})
    return MemorySource(stored, {}, {"quant_model_description_w4a8_dynamic.json": description})


@pytest.mark.parametrize("packed", [False, True])
def test_two_stage_scales_multiply(packed: bool) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-8, 8, (4, 16), dtype=torch.int8, generator=g)
    first, second = torch.rand(4, 1, generator=g), torch.randint(9, 17, (4, 2), generator=g).float()
    source = older(
        packed,
        weight=layouts.pack_rows((q + 8).to(torch.uint8)) if packed else q,
        weight_scale=first,
        weight_offset=torch.zeros(4, 1),
        weight_scale_second=second,
        weight_offset_second=torch.zeros(4, 2, dtype=torch.int64),
    )
    entry, w = only(FMT, source)
    assert entry.spec == QuantSpec(4, 8, act=DYNAMIC)
    assert torch.equal(w.dequantize(), q.float() * (second * first).repeat_interleave(8, 1))


@pytest.mark.parametrize("as_bits", [False, True])
def test_static_w8a8_has_the_weights_scale_inside_deq_scale(as_bits: bool) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-128, 128, (4, 16), dtype=torch.int8, generator=g)
    scale, x_scale, x_offset = torch.rand(4, generator=g), torch.tensor([0.5]), torch.tensor([3.0])
    deq = scale * x_scale
    stored = {
        "weight": q,
        "input_scale": x_scale,
        "input_offset": x_offset,
        "quant_bias": -(q.float().sum(1) * x_offset).to(torch.int32),
        "deq_scale": deq.view(torch.int32).long() if as_bits else deq,
    }
    tensors = {f"{GATE}.{k}": t for k, t in stored.items()}
    source = MemorySource(tensors, {}, {DESCRIPTION: dict.fromkeys(tensors, "W8A8")})
    entry, w = only(FMT, source)
    assert entry.spec is not None
    assert entry.spec.act == ActSpec(static=True)
    assert torch.equal(w.dequantize(), q.float() * scale[:, None])
    tensors[f"{GATE}.quant_bias"] += 1000
    with pytest.raises(TransloadError, match=r"gate_proj.*holds the layer's bias"):
        decoded(FMT, MemorySource(tensors, {}, source.files))


def changed(**parts: torch.Tensor) -> MemorySource:
    source = written(FMT, {DOWN: random_weight(W4A8, 4, 32)})
    return MemorySource(source.tensors | {f"{DOWN}.{k}": t for k, t in parts.items()}, {}, source.files)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (changed(weight=torch.zeros(3, 32, dtype=torch.int8)), "weight.* has 3 rows"),
        (changed(weight_scale=torch.ones(4, 3)), "3 groups, which do not divide K=32"),
        (changed(weight_scale=torch.full((4, 1), float("nan"))), "down_proj: .*NaN"),
        (changed(weight_offset=torch.ones(4, 1)), "down_proj: weight_offset is not zero"),
        (changed(scale_bias=torch.zeros(4, 16)), "down_proj: scale_bias is not 8"),
        (changed(scale_bias=torch.zeros(4, 5)), "scale_bias.* has shape .4, 5."),
        (MemorySource(changed().tensors, {}, {DESCRIPTION: {f"{DOWN}.weight": "W2A2"}}), "'W2A2'"),
        (MemorySource(changed().tensors, {}, {DESCRIPTION: {}}), "is I8, but quant_model_description.json"),
    ],
)
def test_contradictions_are_named(source: MemorySource, message: str) -> None:
    with pytest.raises(TransloadError, match=message) as caught:
        decoded(FMT, source)
    assert "memory" in str(caught.value)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_broken_files_never_crash(data: st.DataObject) -> None:
    spec = data.draw(st.sampled_from(SPECS))
    survives(
        FMT, data.draw(broken(written(FMT, {DOWN: random_weight(spec, 4, 64)}, {"model.layers.0.mlp.gate": (4, 64)})))
    )


@pytest.mark.parametrize(
    ("refused", "shape", "reason"),
    [
        (W4A8, (5, 32), "N=5 is odd"),
        (W4A8, (4, 40), "K=40"),
        (QuantSpec(4, -1, zero=Zero.CODES, act=DYNAMIC), (4, 32), "zero points as midpoint"),
        (QuantSpec(8, 32, act=DYNAMIC), (4, 32), "not groups of 32"),
        (QuantSpec(4, 32, act=ActSpec(group_size=32)), (4, 32), "per token"),
        (QuantSpec(3, 32), (4, 32), "4 or 8 bits"),
    ],
)
def test_what_it_cannot_hold_is_a_sentence(refused: QuantSpec, shape: tuple[int, int], reason: str) -> None:
    assert reason in (FMT.cannot_hold(refused, shape) or "")


def test_a_folder_on_disk_opens() -> None:
    checkpoint = transload.open(GOLDEN / "msmodelslim_w4a8")
    assert isinstance(checkpoint[DOWN], QTensor)
    assert checkpoint.modules()[DOWN] == W4A8


def test_a_folder_written_here_opens(tmp_path: Path) -> None:
    w = random_weight(W4A8, 4, 32)
    assert transload.open(written(FMT, {DOWN: w}).save(tmp_path / "model"))[DOWN].equal(w)
