"""Every ordered pair of formats that hold a scheme: ports along all pairs end with the numbers of the beginning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_port import LAYER, model, module

import transload
from transload.formats import FORMATS
from transload.porting.plan import Options
from transload.porting.planning import plan_port
from transload.porting.target import find_target
from transload.quant import PER_CHANNEL, ActSpec, QuantSpec, Zero
from transload.rewrite import exact_forms

N, K = 64, 96
F16, F32 = torch.float16, torch.float32
SPECS = [
    QuantSpec(4, 32, scale_dtype=F16),
    QuantSpec(4, 32, zero=Zero.CODES, scale_dtype=F16),
    QuantSpec(8, PER_CHANNEL, scale_dtype=F16),
    QuantSpec(8, 32, zero=Zero.CODES, scale_dtype=F16),
    QuantSpec(2, 16, zero=Zero.CODES, scale_dtype=F16),
    QuantSpec(4, 32, scale_dtype=torch.bfloat16),
    QuantSpec(8, PER_CHANNEL, scale_dtype=F32, act=ActSpec()),
    QuantSpec(4, 16, zero=Zero.MINS, scale_dtype=F32),
    QuantSpec(4, 16, zero=Zero.CODES, scale_dtype=F16, act_order=True),
]
WRITABLE = [f.name for f in FORMATS if f.container == "safetensors" and f.name not in ("plain", "bf16")]


def holders(spec: QuantSpec) -> list[str]:
    """Formats that hold every form of a scheme that a port may meet on its way: itself or an exact form of it."""
    found = []
    for name in WRITABLE:
        target = find_target(name)
        if any(target.format.cannot_hold(form, (N, K)) is None for form in exact_forms(spec)):
            found.append(name)
    return found


def every_pair(names: list[str]) -> Iterator[str]:
    """A walk through all ordered pairs: a b a c a d ... b c b d ..."""
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            yield from (a, b)
    yield names[0]


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: str(s).replace(" ", "-"))
def test_numbers_survive_every_pair_of_formats(spec: QuantSpec, tmp_path: Path) -> None:
    first = model(tmp_path / "first", module("mlp.up_proj", spec, N, K))
    names = holders(spec)
    assert "transload" in names
    at = first
    for i, name in enumerate(every_pair(names)):
        # A form written out by one format (explicit zeros, wider codes) may be too wide for the next.
        source = first if _refuses(name, at) else at
        assert source is at or _widened(at, spec), f"{name} refuses {spec} itself"
        report = transload.port(source, tmp_path / str(i), name)
        assert report.exact
        assert transload.verify(first, tmp_path / str(i)).equal, f"{at} -> {name}"
        at = tmp_path / str(i)


def _refuses(name: str, path: Path) -> bool:
    plan = plan_port(transload.open(path), find_target(name), Options())
    return bool(plan.refusals)


def _widened(path: Path, spec: QuantSpec) -> bool:
    found = transload.open(path).entries[f"{LAYER}mlp.up_proj"].spec
    assert found is not None
    return replace(found, act=None) != replace(spec, act=None)
