"""Prompts in the native decoder: many tokens in one call, against torch and against single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tests.backends.test_native_decoder import (
    KERNELS,
    SCHEMES,
    SHAPES,
    W4,
    Shape,
    angles,
    build,
    error,
    reference,
    with_down,
)
from torch import Tensor

from transload.errors import ConfigError
from transload.hal import Decoder, DecoderLinear
from transload.quant import ActSpec, QuantSpec, Zero
from transload.reference import quantize_rtn
from transload_cpu import native_library
from transload_cpu.native_decoder import NativeDecoder
from transload_cpu.native_kernel import NativeKernel

pytestmark = pytest.mark.skipif(
    native_library.unavailable() is not None, reason=str(native_library.unavailable() or "")
)


def run(
    step: NativeDecoder, d: Decoder, xs: Tensor, cuts: Sequence[int], dtype: torch.dtype = torch.float32, room: int = 3
) -> Tensor:
    """The tokens in calls of so many each, single ones by `run`, on a cache of NaN with some room behind."""
    shape = (d.kv_heads, len(xs) + room, d.head_dim)
    rooms = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2 * len(d.layers))]
    cache = step.bind(rooms[::2], rooms[1::2])
    cos, sin = angles(len(xs), d.rotary)
    out, at = [], 0
    for count in cuts:
        part = slice(at, at + count)
        if count == 1:
            out.append(step.run(xs[at], cos[at], sin[at], cache, at).unsqueeze(0))
        else:
            out.append(step.run_many(xs[part], cos[part], sin[part], cache, at))
        at += count
    assert at == len(xs)
    return torch.cat(out)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_come_out_as_in_torch(kernel: NativeKernel, scheme: str, shape: str) -> None:
    spec, sizes = SCHEMES[scheme], SHAPES[shape]
    d, floats = build(kernel, spec, sizes, interleaved=shape == "dim80-part-turned", sandwich=shape == "dim64")
    step = NativeDecoder(d, kernel.isa)
    torch.manual_seed(1)
    xs = torch.randn(19, sizes.hidden)
    want = reference(d, floats, xs, *angles(19, sizes.rotary))
    limit = 5e-4 if spec.act is None else 3e-2
    assert error(run(step, d, xs, [19]), want) < limit
    assert error(run(step, d, xs, [2, 1, 13, 3]), want) < limit


@pytest.mark.parametrize("shape", ["dim64", "dim20-nothing-turned", "dim96-one-key-head"])
def test_long_prompts_in_float_and_bfloat16(shape: str) -> None:
    kernel = KERNELS[0]
    d, floats = build(kernel, W4, SHAPES[shape], interleaved=False, sandwich=False)
    step = NativeDecoder(d, kernel.isa)
    xs = torch.randn(700, d.hidden)
    want = reference(d, floats, xs, *angles(700, d.rotary))
    assert error(run(step, d, xs, [700], room=0), want) < 5e-4
    assert error(run(step, d, xs, [300, 1, 1, 398]), want) < 5e-4
    assert error(run(step, d, xs, [700], torch.bfloat16), want) < 1e-2


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("window", [1, 7, 130, 260])
def test_windows_hide_what_single_tokens_do_not_see(kernel: NativeKernel, window: int) -> None:
    d, _ = build(kernel, W4, Shape(4, 2, 32, 32), interleaved=False, sandwich=False)
    d = replace(d, layers=(replace(d.layers[0], window=window), d.layers[1]))
    step, xs = NativeDecoder(d, kernel.isa), torch.randn(290, d.hidden)
    one_by_one = run(step, d, xs, [1] * 290)
    assert error(run(step, d, xs, [290]), one_by_one) < 2e-4
    assert error(run(step, d, xs, [141, 1, 148]), one_by_one) < 2e-4


def test_threads_and_cuts_change_no_bit() -> None:
    d, _ = build(KERNELS[0], SCHEMES["w4a8"], Shape(8, 4, 64, 64, hidden=512, wide=1024), False, False)
    step, xs, before = NativeDecoder(d, KERNELS[0].isa), torch.randn(1100, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(step, d, xs, [1100])  # more than one native call takes
        for cuts in ([2, 1098], [550, 550], [129, 255, 716]):
            assert torch.equal(run(step, d, xs, cuts), one)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(run(step, d, xs, [1100]), one)
    finally:
        torch.set_num_threads(before)


def test_float_weights_and_mixed_widths_in_one_layer() -> None:
    kernel, s = KERNELS[0], SHAPES["dim64"]
    d, floats = build(kernel, W4, s, interleaved=False, sandwich=False)
    sizes = (s.heads * s.dim, s.kv_heads * s.dim)
    first, bias = d.layers[1].qkv.parts[0][0], torch.randn(sizes[1])
    wide = quantize_rtn(torch.randn(sizes[1], s.hidden) * 0.1, QuantSpec(8, 24, zero=Zero.CODES, act=ActSpec()))
    half = (torch.randn(sizes[1], s.hidden) * 0.1).bfloat16()
    qkv = DecoderLinear(((first, None), (kernel.pack(wide), bias), (half, bias)))
    down = torch.randn(s.hidden, s.wide) * 0.1
    mixed = replace(with_down(d.layers[1], down), qkv=qkv)
    joined = torch.cat([floats[1][1][0][: sizes[0]], wide.dequantize(), half.float()])
    biases = torch.cat([torch.zeros(sizes[0]), bias, bias])
    floats[1] = (floats[1][0], (joined, biases), floats[1][2], floats[1][3], (down, torch.zeros(s.hidden)))
    d = replace(d, layers=(d.layers[0], mixed))
    xs = torch.randn(21, s.hidden)
    got = run(NativeDecoder(d, kernel.isa), d, xs, [21])
    assert error(got, reference(d, floats, xs, *angles(21, s.rotary))) < 1e-2  # one weight has int8 activations


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 40, 150, 199])
def test_a_bad_token_spoils_later_ones_only(value: float, place: int) -> None:
    d, _ = build(KERNELS[0], W4, SHAPES["dim64"], interleaved=False, sandwich=False)
    step, xs = NativeDecoder(d, KERNELS[0].isa), torch.randn(200, d.hidden)
    good = run(step, d, xs, [200])
    xs[place] = value
    bad = run(step, d, xs, [200])
    assert torch.equal(bad[:place], good[:place])
    assert bad[place:].isnan().any(dim=1).all()


def test_wrong_tokens_are_refused_before_they_are_read() -> None:
    d, _ = build(KERNELS[0], W4, SHAPES["dim64"], interleaved=False, sandwich=False)
    step = NativeDecoder(d, KERNELS[0].isa)
    rooms = [torch.zeros(2, 8, 64) for _ in range(4)]
    cache, (cos, sin), x = step.bind(rooms[:2], rooms[2:]), angles(5, 64), torch.zeros(5, d.hidden)
    for wrong in ((x[:, 1:], cos, sin), (x, cos[1:], sin), (x.double(), cos, sin), (x.T.contiguous().T, cos, sin)):
        with pytest.raises(ConfigError, match="expected contiguous float32"):
            step.run_many(*wrong, cache, 0)
    for length in (-1, 4, 9, 2**62):
        with pytest.raises(ConfigError, match="contradict"):
            step.run_many(x, cos, sin, cache, length)
    with pytest.raises(ConfigError, match="contradict"):
        step.run_many(x[:0], cos[:0], sin[:0], cache, 0)
