"""Round trips between every pair of formats that can both hold a scheme: no number may change."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from pathlib import Path

import pytest
import torch
from memory_source import decoded, random_weight, written
from onnx_linears import save

import transload
from transload.formats import FORMATS
from transload.formats.base import Format
from transload.quant import ActSpec, Grid, QTensor, QuantSpec, Zero
from transload.rewrite import exact_forms, rewrite

SHAPE = (32, 256)
MODULE = "model.layers.0.mlp.down_proj"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOKEN = ActSpec()

SPECS = [
    *(
        QuantSpec(4, g, zero=z, scale_dtype=d)
        for g in (32, 128, -1)
        for z in (Zero.MIDPOINT, Zero.CODES)
        for d in (F16, F32)
    ),
    *(QuantSpec(b, 64, zero=z, scale_dtype=F16) for b in (2, 3, 8) for z in (Zero.MIDPOINT, Zero.CODES)),
    QuantSpec(4, 64, zero=Zero.CODES, scale_dtype=BF16),
    QuantSpec(4, 32, zero=Zero.FLOATS, scale_dtype=F16),
    QuantSpec(4, 32, zero=Zero.MINS, scale_dtype=F16),
    QuantSpec(4, 64, scale_dtype=F16, act_order=True),
    QuantSpec(4, -1, act=TOKEN),
    QuantSpec(4, 64, act=TOKEN),
    QuantSpec(8, -1, act=TOKEN),
    QuantSpec(8, -1),
    QuantSpec(4, 64, Grid.NF4, Zero.NONE),
    QuantSpec(4, 128, Grid.FP4, Zero.NONE),
    QuantSpec(4, 32, Grid.E2M1, Zero.NONE),
    QuantSpec(8, -1, Grid.E4M3, Zero.NONE),
]
WRITERS = [f for f in FORMATS if f.name != "plain" and any(f.cannot_hold(s, SHAPE) is None for s in SPECS)]


def weight(spec: QuantSpec) -> QTensor:
    w = random_weight(spec, *SHAPE, seed=spec.bits)
    if spec.grid is Grid.E4M3:
        w.codes[(w.codes & 127) == 127] = 0  # NaN is no weight
    return w


def through(fmt: Format, w: QTensor, folder: Path) -> QTensor:
    """What is read back after writing a weight in a format."""
    if fmt.container == "onnx":
        save(folder / "m.onnx", [(MODULE, w)], overwrite=True)
        found = transload.open(folder / "m.onnx")[MODULE]
        assert isinstance(found, QTensor)
        return found
    return decoded(fmt, written(fmt, {MODULE: w}))[MODULE]


def holds(fmt: Format, spec: QuantSpec) -> bool:
    return fmt.container in ("safetensors", "onnx") and fmt.cannot_hold(spec, SHAPE) is None


PAIRS = [(s, a, b) for s in SPECS for a, b in permutations(WRITERS, 2) if holds(a, s) and holds(b, s)]


@pytest.mark.parametrize(("spec", "first", "second"), PAIRS, ids=[f"{s}: {a.name} to {b.name}" for s, a, b in PAIRS])
def test_numbers_pass_through_both_formats(spec: QuantSpec, first: Format, second: Format, tmp_path: Path) -> None:
    w = weight(spec)
    found = through(second, through(first, w, tmp_path).with_act(spec.act), tmp_path)
    assert found.with_act(spec.act).equal(w)
    finer = "onnx" in (first.name, second.name)  # int8 activations per token and block instead of per token
    assert found.spec.act == spec.act or (finer and spec.act is not None and found.spec.act is not None)


def test_every_writer_takes_part() -> None:
    """bitsandbytes' codebooks pair with this library's own format only; every other writer meets several."""
    counts = Counter(f.name for _, a, b in PAIRS for f in (a, b))
    assert counts.keys() >= {
        "transload", "compressed-tensors", "gptq", "gptq_v2", "awq", "awq_gemv", "bitsandbytes", "msmodelslim", "onnx"
    }  # fmt: skip
    assert min(counts.values()) >= 2


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_exact_forms_that_a_writer_takes_hold_the_same_values(spec: QuantSpec, tmp_path: Path) -> None:
    w = weight(spec)
    values = w.dequantize()
    for fmt in WRITERS:
        form = next((s for s in exact_forms(spec) if holds(fmt, s)), None)
        if form is not None:
            assert torch.equal(through(fmt, rewrite(w, form), tmp_path).dequantize(), values), f"{fmt.name}: {form}"


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_writers_announce_shapes_from_weights_without_data(spec: QuantSpec) -> None:
    w = weight(spec)
    sides = {name: t for name in ("scales", "zeros", "mins") if (t := getattr(w, name)) is not None}
    empty = QTensor(spec, w.codes.to("meta"), **{n: t.to("meta") for n, t in sides.items()}, g_idx=w.g_idx)
    for fmt in WRITERS:
        if holds(fmt, spec):
            announced = {k: (t.dtype, t.shape) for k, t in fmt.encode(MODULE, empty).items()}
            assert announced == {k: (t.dtype, t.shape) for k, t in fmt.encode(MODULE, w).items()}, fmt.name
