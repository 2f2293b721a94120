"""AWQ gemm, gemv and gemv_fast against AutoAWQ's files and by round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile import broken, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource, decoded, golden, only, random_weight, written

import transload
from transload.errors import CannotHold, TransloadError
from transload.formats.awq import Awq, AwqGemv, AwqGemvFast
from transload.quant import QuantSpec, Zero

MODULE = "model.layers.0.mlp.up_proj"
FORMATS = (Awq(), AwqGemv())


def spec(group: int, zero: Zero = Zero.CODES) -> QuantSpec:
    return QuantSpec(4, group, zero=zero, scale_dtype=torch.float16)


@pytest.mark.parametrize(("name", "fmt"), [("awq_gemm_g128", Awq()), ("awq_gemv_g64", AwqGemv())])
def test_golden_files_decode_exactly_and_encode_to_the_same_bytes(name: str, fmt: Awq) -> None:
    source, tensors = golden(name)
    entry, w = only(fmt, source)
    assert entry.shape == tuple(tensors["dequant"].shape)
    assert torch.equal(w.dequantize(torch.float16).float(), tensors["dequant"])
    for part, t in fmt.encode(MODULE, w).items():
        assert torch.equal(t, source.tensors[part]), part


def test_golden_gemv_fast_has_the_codes_of_gemv() -> None:
    """The same layer in AutoAWQ's two layouts; the offsets are scale * zero rounded to float16."""
    (_, fast), (_, gemv) = (
        only(AwqGemvFast(), golden("awq_gemv_fast_g64")[0]),
        only(AwqGemv(), golden("awq_gemv_g64")[0]),
    )
    assert torch.equal(fast.codes, gemv.codes)
    assert torch.equal(fast.scales, gemv.scales)
    assert fast.mins is not None
    assert gemv.zeros is not None
    assert torch.equal(fast.mins, -(gemv.scales * gemv.zeros.half()))


def test_a_word_holds_outputs_0_2_4_6_1_3_5_7() -> None:
    w = random_weight(spec(-1), 8, 1)
    w.codes.copy_(torch.tensor([[3], [6], [5], [2], [4], [6], [5], [1]]))
    assert int(Awq().encode(MODULE, w)[f"{MODULE}.qweight"]) == 0x16265453


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@given(n=st.integers(1, 6), groups=st.integers(1, 11), group=st.sampled_from([-1, 32, 64, 128]))
@settings(max_examples=25, deadline=None)
def test_any_aligned_shape_round_trips(fmt: Awq, n: int, groups: int, group: int) -> None:
    w = random_weight(spec(group), 8 * n, (128 if group == -1 else group) * groups, groups)
    assert only(fmt, written(fmt, {MODULE: w}))[1].equal(w)


def test_modules_left_in_float_match_nothing_quantized_as_substrings() -> None:
    weights = {"model.layers.0.mlp.experts.0.gate_proj": random_weight(spec(32), 8, 64)}
    config = written(Awq(), weights, {"model.layers.0.mlp.gate": (4, 64), "lm_head": (8, 64)}).config
    skipped = config["quantization_config"]["modules_to_not_convert"]  # type: ignore[index]
    assert skipped == ["model.layers.0.mlp.gate", "lm_head"]
    assert not any(name in module for name in skipped for module in weights)


def test_two_group_sizes_are_refused_together() -> None:
    weights = {"a": random_weight(spec(32), 8, 64), "b": random_weight(spec(64), 8, 64)}
    with pytest.raises(CannotHold, match=r"32 \(a\), 64 \(b\)"):
        written(Awq(), weights)


@pytest.mark.parametrize(
    ("fmt", "part", "t", "message"),
    [
        (Awq(), "scales", torch.ones(3, 8).half(), "scales.*expected .2, 8."),
        (Awq(), "qzeros", torch.zeros(2, 2, dtype=torch.int32), "qzeros.*expected .2, 1."),
        (Awq(), "qweight", torch.zeros(0, 1, dtype=torch.int32), "no elements"),
        (Awq(), "qweight", torch.zeros(70, 1, dtype=torch.int32), "scales.*for N=8, K=70"),
        (Awq(), "scales", torch.full((2, 8), float("inf")).half(), "up_proj.*infinity"),
        (AwqGemv(), "qzeros", torch.zeros(8, 1, dtype=torch.int32), "qzeros.*expected .8, 4."),
    ],
)
def test_contradictions_are_named(fmt: Awq, part: str, t: torch.Tensor, message: str) -> None:
    source = written(fmt, {MODULE: random_weight(spec(32), 8, 64)})
    source = MemorySource(source.tensors | {f"{MODULE}.{part}": t}, source.config)
    with pytest.raises(TransloadError, match=message) as caught:
        decoded(fmt, source)
    assert "memory" in str(caught.value)


@pytest.mark.parametrize("fmt", [*FORMATS, AwqGemvFast()], ids=lambda f: f.name)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_broken_files_never_crash(fmt: Awq, data: st.DataObject) -> None:
    fast = fmt.name == "awq_gemv_fast"
    source = golden("awq_gemv_fast_g64")[0] if fast else written(fmt, {MODULE: random_weight(spec(32), 8, 64)})
    survives(fmt, data.draw(broken(source)))


@pytest.mark.parametrize(
    ("fmt", "refused", "shape", "reason"),
    [
        (Awq(), spec(32), (12, 64), "N=12"),
        (Awq(), spec(32, Zero.MIDPOINT), (8, 64), "zero points as codes"),
        (Awq(), spec(48), (8, 64), "K=64 is not a multiple of 48"),
        (Awq(), QuantSpec(8, 32, scale_dtype=torch.float16), (8, 64), "4 bits"),
        (AwqGemv(), spec(16), (8, 64), "32, 64"),
        (AwqGemvFast(), spec(64), (8, 64), "read only"),
    ],
)
def test_what_it_cannot_hold_is_a_sentence(fmt: Awq, refused: QuantSpec, shape: tuple[int, int], reason: str) -> None:
    assert reason in (fmt.cannot_hold(refused, shape) or "")


def test_a_folder_on_disk_opens(tmp_path: Path) -> None:
    w = random_weight(spec(32), 24, 96)
    assert transload.open(written(Awq(), {MODULE: w}).save(tmp_path / "model"))[MODULE].equal(w)
