"""The neutral value: what it accepts, what it means, and how it is cut and joined."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from strategies import weights
from transload.errors import ConfigError, FormatError
from transload.quant import PER_CHANNEL, ActSpec, Grid, QTensor, QuantSpec, Zero, fuse_rows, stack_experts

SYM = QuantSpec(4, 8)


def tensor(spec: QuantSpec = SYM, n: int = 3, k: int = 20, **changes: Any) -> QTensor:
    """A weight of zeros with one part exchanged."""
    side = (n, spec.groups(k))
    parts: dict[str, Any] = {"codes": torch.zeros(n, k, dtype=torch.uint8), "scales": torch.ones(side)}
    if spec.zero is Zero.CODES:
        parts["zeros"] = torch.zeros(side, dtype=torch.uint8)
    if spec.zero is Zero.FLOATS:
        parts["zeros"] = torch.zeros(side)
    if spec.zero is Zero.MINS:
        parts["mins"] = torch.zeros(side)
    return QTensor(spec, **{**parts, **changes})


BAD_SPECS = [
    ({"bits": 1, "group_size": 8}, "1-bit codes"),
    ({"bits": 9, "group_size": 8}, "9-bit codes"),
    ({"bits": 4, "group_size": 0}, "group_size 0"),
    ({"bits": 4, "group_size": -2}, "group_size -2"),
    ({"bits": 4, "group_size": 8, "scale_dtype": torch.float64}, "float64"),
    ({"bits": 4, "group_size": 8, "zero": Zero.NONE}, "integers need a zero"),
    ({"bits": 4, "group_size": 8, "grid": Grid.NF4}, "codebooks none"),
    ({"bits": 8, "group_size": 8, "grid": Grid.NF4, "zero": Zero.NONE}, "4-bit codes, not 8"),
    ({"bits": 4, "group_size": 8, "grid": Grid.E4M3, "zero": Zero.NONE}, "8-bit codes, not 4"),
]


@pytest.mark.parametrize(("fields", "words"), BAD_SPECS, ids=[words for _, words in BAD_SPECS])
def test_a_contradictory_spec_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        QuantSpec(**fields)


@pytest.mark.parametrize("fields", [{"bits": 4}, {"group_size": 0}, {"group_size": -3}], ids=str)
def test_a_contradictory_activation_spec_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ActSpec(**fields)


BAD_TENSORS = [
    (SYM, {"codes": torch.zeros(3, 20, dtype=torch.int8)}, "codes are torch.int8"),
    (SYM, {"codes": torch.zeros(20, dtype=torch.uint8)}, "expected uint8"),
    (SYM, {"codes": torch.full((3, 20), 16, dtype=torch.uint8)}, "code 16 does not fit 4 bits"),
    (SYM, {"scales": torch.ones(3, 2)}, r"scales are .* expected .*\(3, 3\)"),
    (SYM, {"scales": torch.ones(3, 3).half()}, "scales are torch.float16"),
    (SYM, {"scales": torch.tensor([1.0, torch.nan, 1.0]).expand(3, 3)}, "NaN or infinity"),
    (SYM, {"zeros": torch.zeros(3, 3, dtype=torch.uint8)}, "zeros given, but zero is midpoint"),
    (SYM, {"mins": torch.zeros(3, 3)}, "mins given"),
    (SYM, {"g_idx": torch.zeros(20, dtype=torch.int32)}, "act_order is False"),
    (replace(SYM, zero=Zero.CODES), {"zeros": None}, "zeros missing"),
    (replace(SYM, zero=Zero.CODES), {"zeros": torch.zeros(3, 3)}, "zeros are torch.float32"),
    (replace(SYM, zero=Zero.CODES), {"zeros": torch.full((3, 3), 16, dtype=torch.uint8)}, "does not fit 4 bits"),
    (replace(SYM, zero=Zero.FLOATS), {"zeros": torch.zeros(3, 3, dtype=torch.uint8)}, "zeros are torch.uint8"),
    (replace(SYM, zero=Zero.MINS), {"mins": None}, "mins missing"),
    (replace(SYM, zero=Zero.MINS), {"mins": torch.full((3, 3), torch.inf)}, "NaN or infinity"),
    (replace(SYM, act_order=True), {}, "g_idx missing"),
    (replace(SYM, act_order=True), {"g_idx": torch.zeros(20, dtype=torch.int64)}, "g_idx is torch.int64"),
    (replace(SYM, act_order=True), {"g_idx": torch.full((20,), 3, dtype=torch.int32)}, "there are 3 groups"),
    (replace(SYM, act_order=True), {"g_idx": torch.full((20,), -1, dtype=torch.int32)}, "there are 3 groups"),
]


@pytest.mark.parametrize(("spec", "changes", "words"), BAD_TENSORS, ids=[words for *_, words in BAD_TENSORS])
def test_parts_that_contradict_the_spec_are_refused(spec: QuantSpec, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        tensor(spec, **changes)


def one_by_one(w: QTensor) -> list[list[float]]:
    """The formula at the top of quant.py, one number at a time in Python's floats."""
    grid, size = w.spec.grid.values(w.spec.bits), w.spec.group_size if w.spec.group_size > 0 else w.k
    values = []
    for n in range(w.n):
        row = []
        for k in range(w.k):
            g = k // size if w.g_idx is None else int(w.g_idx[k])
            zero = {Zero.MIDPOINT: 2 ** (w.spec.bits - 1)}.get(w.spec.zero, 0.0)
            zero = float(w.zeros[n, g]) if w.zeros is not None else zero
            offset = float(w.mins[n, g]) if w.mins is not None else 0.0
            row.append(float(w.scales[n, g]) * (float(grid[int(w.codes[n, k])]) - zero) + offset)
        values.append(row)
    return values


@given(weights())
def test_dequantize_is_the_formula(w: QTensor) -> None:
    assert torch.equal(w.dequantize(torch.float64), torch.tensor(one_by_one(w), dtype=torch.float64))
    assert torch.allclose(w.dequantize().double(), w.dequantize(torch.float64), rtol=1e-5, atol=1e-5)


def test_act_order_takes_the_group_from_g_idx() -> None:
    spec = QuantSpec(4, 8, zero=Zero.CODES, act_order=True)
    g_idx = torch.tensor([2, 0, 1, 1, 0, 2, 0, 0], dtype=torch.int32).repeat(3)
    codes = torch.arange(24, dtype=torch.uint8).repeat(2, 1) % 16
    scales = torch.tensor([[1.0, 10.0, 100.0], [2.0, 20.0, 200.0]])
    w = QTensor(spec, codes, scales, torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.uint8), g_idx=g_idx)
    assert w.dequantize().tolist() == one_by_one(w)


@given(weights())
def test_a_weight_equals_its_copy_and_nothing_else(w: QTensor) -> None:
    assert w.equal(replace(w, codes=w.codes.clone()))
    assert not w.equal(replace(w, codes=w.codes ^ 1)) or w.spec.grid is Grid.E4M3
    assert not w.equal(w.with_act(ActSpec()))
    assert w.with_act(ActSpec()).with_act(None).equal(w)


@given(weights(), st.data())
def test_rows_fused_again_are_the_whole(w: QTensor, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, w.n))
    parts = [p for p in (w.rows(0, cut), w.rows(cut, w.n)) if p.n]
    assert fuse_rows(parts).equal(w)
    assert torch.equal(w.rows(0, cut).dequantize(), w.dequantize()[:cut])


@given(weights(), st.integers(1, 3))
def test_experts_stacked_come_out_one_by_one(w: QTensor, count: int) -> None:
    stack = stack_experts([w] * count)
    assert (stack.experts, stack.n, stack.k) == (count, w.n, w.k)
    assert all(stack.expert(e).equal(w) for e in range(count))
    assert torch.equal(stack.dequantize()[-1], w.dequantize())
    assert w.experts is None


def test_layers_of_different_schemes_are_not_joined() -> None:
    other = tensor(replace(SYM, zero=Zero.CODES))
    with pytest.raises(ConfigError, match="different schemes"):
        fuse_rows([tensor(), other])
    with pytest.raises(ConfigError, match="different schemes"):
        stack_experts([tensor(), other])


def test_layers_with_other_act_orders_are_not_joined() -> None:
    spec = replace(SYM, act_order=True)
    one, other = (tensor(spec, g_idx=torch.full((20,), g, dtype=torch.int32)) for g in (0, 1))
    assert fuse_rows([one, one]).n == 6
    with pytest.raises(ConfigError):
        fuse_rows([one, other])
    with pytest.raises(ConfigError, match="act-order"):
        stack_experts([one, one])


def test_names_of_schemes() -> None:
    assert QuantSpec(4, 128).scheme == "W4A16"
    assert QuantSpec(8, PER_CHANNEL, act=ActSpec()).scheme == "W8A8"
    assert str(QuantSpec(4, 128, zero=Zero.CODES, scale_dtype=torch.float16)) == "int4 g128 asym fp16"
    assert str(QuantSpec(4, 64, Grid.NF4, Zero.NONE)) == "nf4 4 g64 fp32"
    assert "per token and 32" in str(QuantSpec(4, 32, act=ActSpec(group_size=32)))


def test_groups_count_the_last_part() -> None:
    assert [QuantSpec(4, 32).groups(k) for k in (1, 32, 33, 64)] == [1, 1, 2, 2]
    assert QuantSpec(4, PER_CHANNEL).groups(1000) == 1


def test_the_codebooks_are_what_their_owners_define() -> None:
    nf4, fp4, e2m1, e4m3 = (g.values(8 if g is Grid.E4M3 else 4) for g in (Grid.NF4, Grid.FP4, Grid.E2M1, Grid.E4M3))
    assert nf4[0] == -1
    assert nf4[15] == 1
    assert nf4[7] == 0
    assert bool((nf4.diff() > 0).all())
    assert torch.equal(fp4[8:], -fp4[:8])
    assert e2m1[:8].tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert torch.equal(e2m1[8:], -e2m1[:8])
    assert float(e4m3[e4m3.isfinite()].max()) == 448
    assert int(e4m3.isnan().sum()) == 2
