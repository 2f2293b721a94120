"""The native decoder against the same arithmetic in torch, on every instruction set that this processor has."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transload.errors import BackendError, ConfigError
from transload.hal import Decoder, DecoderLayer, DecoderLinear, DecoderMlp, Packed
from transload.quant import ActSpec, QTensor, QuantSpec, Zero
from transload.reference import quantize_rtn
from transload_cpu import backend, native_library
from transload_cpu.native_decoder import NativeDecoder
from transload_cpu.native_kernel import NATIVE_KERNELS, NativeKernel, NativePortable

pytestmark = pytest.mark.skipif(
    native_library.unavailable() is not None, reason=str(native_library.unavailable() or "")
)
KERNELS = [k for k in (*NATIVE_KERNELS, NativePortable()) if native_library.supported(k.isa)]
W4 = QuantSpec(4, 32)
SCHEMES = {
    "w4a16": W4,
    "w4a8": replace(W4, act=ActSpec(group_size=32)),
    "w4a16-zeros": QuantSpec(4, 64, zero=Zero.CODES),
    "w4a8-per-token-mins": QuantSpec(4, 32, zero=Zero.MINS, act=ActSpec()),
    "w8a8": QuantSpec(8, 32, act=ActSpec(group_size=32)),
}


class Shape:
    """Sizes of a small decoder, and its weights by role, packed and as floats."""

    def __init__(self, heads: int, kv_heads: int, dim: int, rotary: int, hidden: int = 72, wide: int = 104) -> None:
        self.heads, self.kv_heads, self.dim, self.rotary = heads, kv_heads, dim, rotary
        self.hidden, self.wide = hidden, wide


def linear(kernel: NativeKernel, spec: QuantSpec, sizes: tuple[int, ...], k: int, bias: bool) -> tuple[Any, Any]:
    """A layer of parts with k inputs, packed, and the same as (weight [N, K], bias [N])."""
    parts: list[tuple[Packed | Tensor, Tensor | None]] = []
    weights, biases = [], []
    for n in sizes:
        w = quantize_rtn(torch.randn(n, k) * k**-0.5, spec)
        b = torch.randn(n) if bias else None
        parts.append((kernel.pack(w), b))
        weights.append(w.dequantize())
        biases.append(torch.zeros(n) if b is None else b)
    return DecoderLinear(tuple(parts)), (torch.cat(weights), torch.cat(biases))


def build(kernel: NativeKernel, spec: QuantSpec, s: Shape, interleaved: bool, sandwich: bool) -> tuple[Decoder, Any]:
    """A decoder of two layers and its float weights."""
    torch.manual_seed(0)
    layers, floats = [], []
    query, key = s.heads * s.dim, s.kv_heads * s.dim
    for _ in range(2):
        norms = [1 + 0.1 * torch.randn(n) for n in (s.hidden, s.dim, s.dim, s.hidden, s.hidden, s.hidden)]
        qkv = linear(kernel, spec, (query, key, key), s.hidden, True)
        out = linear(kernel, spec, (s.hidden,), query, False)
        gate_up = linear(kernel, spec, (s.wide, s.wide), s.hidden, False)
        down = linear(kernel, spec, (s.hidden,), s.wide, True)
        extra = norms if sandwich else [norms[0], None, None, None, norms[4], None]
        layers.append(DecoderLayer(*extra, qkv[0], out[0], DecoderMlp(gate_up[0], down[0])))
        floats.append((extra, qkv[1], out[1], gate_up[1], down[1]))
    norm = 1 + 0.1 * torch.randn(s.hidden)
    d = Decoder(tuple(layers), norm, s.hidden, s.heads, s.kv_heads, s.dim, s.rotary, interleaved, 1e-5, s.dim**-0.5)
    return d, floats


def with_down(layer: DecoderLayer, weight: Packed | Tensor) -> DecoderLayer:
    """The layer with another down projection."""
    return replace(layer, mlp=replace(layer.mlp, down=DecoderLinear(((weight, None),))))


def rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, cos: Tensor, sin: Tensor, rotary: int, interleaved: bool) -> Tensor:
    """Heads [H, D] with their first `rotary` values turned."""
    head, rest = x[:, :rotary], x[:, rotary:]
    a, b = (head[:, 0::2], head[:, 1::2]) if interleaved else head.chunk(2, dim=1)
    pairs = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(pairs, dim=-1).flatten(1) if interleaved else torch.cat(pairs, dim=1)
    return torch.cat([out, rest], dim=1)


def reference(d: Decoder, floats: Any, xs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in float64, all tokens [T, hidden] at once."""
    x, q_size, k_size = xs.double(), d.heads * d.head_dim, d.kv_heads * d.head_dim
    for norms, qkv, out, gate_up, down in floats:
        n = [None if t is None else t.double() for t in norms]
        weights = [(w.double(), b.double()) for w, b in (qkv, out, gate_up, down)]
        y = rms(x, n[0], d.eps) @ weights[0][0].T + weights[0][1]
        q, k, v = y.split([q_size, k_size, k_size], dim=1)
        shape = (len(x), -1, d.head_dim)
        q, k, v = rms(q.reshape(shape), n[1], d.eps), rms(k.reshape(shape), n[2], d.eps), v.reshape(shape)
        q = torch.stack([turned(h, cos[t], sin[t], d.rotary, d.interleaved) for t, h in enumerate(q)])
        k = torch.stack([turned(h, cos[t], sin[t], d.rotary, d.interleaved) for t, h in enumerate(k)])
        ratio = d.heads // d.kv_heads
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(ratio, 1)) * d.scaling
        scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf).softmax(-1)
        seen = torch.einsum("hqk,khd->qhd", scores, v.repeat_interleave(ratio, 1)).reshape(len(x), -1)
        x = x + rms(seen @ weights[1][0].T + weights[1][1], n[3], d.eps)
        gate, up = (rms(x, n[4], d.eps) @ weights[2][0].T + weights[2][1]).chunk(2, dim=1)
        x = x + rms((torch.nn.functional.silu(gate) * up) @ weights[3][0].T + weights[3][1], n[5], d.eps)
    return rms(x, d.norm.double(), d.eps)


def angles(tokens: int, rotary: int) -> tuple[Tensor, Tensor]:
    turns = torch.arange(tokens).unsqueeze(1) * 0.3 ** torch.arange(rotary // 2)
    return turns.cos(), turns.sin()


def run(step: NativeDecoder, d: Decoder, xs: Tensor, capacity: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """All tokens one after the other on a cache of garbage."""
    rooms = [torch.full((d.kv_heads, capacity, d.head_dim), torch.nan, dtype=dtype) for _ in range(2 * len(d.layers))]
    cache = step.bind(rooms[::2], rooms[1::2])
    cos, sin = angles(len(xs), d.rotary)
    return torch.stack([step.run(x, cos[t], sin[t], cache, t) for t, x in enumerate(xs)])


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


SHAPES = {
    "dim64": Shape(4, 2, 64, 64),
    "dim80-part-turned": Shape(3, 3, 80, 40),
    "dim96-one-key-head": Shape(5, 1, 96, 96),
    "dim128": Shape(2, 1, 128, 128, hidden=96, wide=64),
    "dim20-nothing-turned": Shape(6, 2, 20, 0, hidden=33, wide=50),
}


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_come_out_as_in_torch(kernel: NativeKernel, scheme: str, shape: str) -> None:
    spec, sizes = SCHEMES[scheme], SHAPES[shape]
    d, floats = build(kernel, spec, sizes, interleaved=shape == "dim80-part-turned", sandwich=shape == "dim64")
    step = kernel.decoder(d)
    assert isinstance(step, NativeDecoder), step
    torch.manual_seed(1)
    xs = torch.randn(9, sizes.hidden)
    want = reference(d, floats, xs, *angles(9, sizes.rotary))
    # 15-bit activations; 8-bit ones lose half a percent in each of 8 products.
    assert error(run(step, d, xs, 12), want) < (5e-4 if spec.act is None else 3e-2)


def test_long_texts_in_float_and_bfloat16() -> None:
    kernel = KERNELS[0]
    d, floats = build(kernel, W4, SHAPES["dim64"], interleaved=False, sandwich=False)
    step = NativeDecoder(d, kernel.isa)
    xs = torch.randn(700, d.hidden)
    want = reference(d, floats, xs, *angles(700, d.rotary))
    assert error(run(step, d, xs, 700), want) < 5e-4
    assert error(run(step, d, xs, 701, torch.bfloat16), want) < 1e-2


def test_threads_change_no_bit() -> None:
    d, _ = build(KERNELS[0], SCHEMES["w4a8"], Shape(8, 4, 64, 64, hidden=512, wide=1024), False, False)
    step, xs, before = NativeDecoder(d, KERNELS[0].isa), torch.randn(300, 512), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run(step, d, xs, 300)
        for threads in (2, 3, 7):
            torch.set_num_threads(threads)
            assert torch.equal(run(step, d, xs, 300), one)
    finally:
        torch.set_num_threads(before)


def test_float_weights_and_mixed_widths_in_one_layer() -> None:
    kernel, s = KERNELS[0], SHAPES["dim64"]
    d, floats = build(kernel, W4, s, interleaved=False, sandwich=False)
    layer, weights = d.layers[1], floats[1]
    sizes = (s.heads * s.dim, s.kv_heads * s.dim, s.kv_heads * s.dim)
    wide = quantize_rtn(torch.randn(sizes[1], s.hidden) * 0.1, QuantSpec(8, 24, zero=Zero.CODES))
    half = (torch.randn(sizes[2], s.hidden) * 0.1).bfloat16()
    first, bias = layer.qkv.parts[0][0], torch.randn(sizes[1])
    qkv = DecoderLinear(((first, None), (kernel.pack(wide), bias), (half, None)))
    down = torch.randn(s.hidden, s.wide) * 0.1
    mixed = replace(layer, qkv=qkv, mlp=replace(layer.mlp, down=DecoderLinear(((down, None),))))
    rows = weights[1][0][: sizes[0]]
    joined = torch.cat([rows, wide.dequantize(), half.float()])
    biases = torch.cat([torch.zeros(sizes[0]), bias, torch.zeros(sizes[2])])
    floats[1] = (weights[0], (joined, biases), weights[2], weights[3], (down, torch.zeros(s.hidden)))
    d = replace(d, layers=(d.layers[0], mixed))
    xs = torch.randn(6, s.hidden)
    got = run(NativeDecoder(d, kernel.isa), d, xs, 8)
    assert error(got, reference(d, floats, xs, *angles(6, s.rotary))) < 5e-4


def test_act_order_weights() -> None:
    kernel, s = KERNELS[0], SHAPES["dim128"]
    d, floats = build(kernel, W4, s, interleaved=False, sandwich=False)
    plain = quantize_rtn(torch.randn(s.hidden, s.wide) * 0.1, W4)
    order = torch.randperm(s.wide)
    shuffled = QTensor(replace(W4, act_order=True), plain.codes[:, order], plain.scales, g_idx=(order // 32).int())
    d = replace(d, layers=(d.layers[0], with_down(d.layers[1], kernel.pack(shuffled))))
    floats[1] = (*floats[1][:4], (shuffled.dequantize(), torch.zeros(s.hidden)))
    xs = torch.randn(4, s.hidden)
    assert error(run(NativeDecoder(d, kernel.isa), d, xs, 8), reference(d, floats, xs, *angles(4, s.rotary))) < 5e-4


def test_a_token_that_is_not_a_number_stays_alone_in_its_sequence() -> None:
    d, _ = build(KERNELS[0], W4, SHAPES["dim64"], interleaved=False, sandwich=False)
    step = NativeDecoder(d, KERNELS[0].isa)
    xs = torch.randn(3, d.hidden)
    good = run(step, d, xs, 4)
    bad = run(step, d, torch.cat([xs, torch.full((1, d.hidden), torch.nan)]), 4)
    assert torch.equal(bad[:3], good)
    assert bad[3].isnan().all()
    assert torch.equal(run(step, d, xs, 4), good)


def test_refusals_name_what_was_found() -> None:
    kernel = KERNELS[0]
    d, _ = build(kernel, W4, SHAPES["dim64"], interleaved=False, sandwich=False)
    other = next(k for k in backend.kernels if not isinstance(k, NativeKernel))
    foreign = other.pack(quantize_rtn(torch.randn(d.hidden, 104), W4))
    reason = kernel.decoder(replace(d, layers=(with_down(d.layers[0], foreign), d.layers[1])))
    assert reason == f"down is multiplied by kernel '{other.name}'"
    wide = with_down(d.layers[0], torch.zeros(d.hidden, 104, dtype=torch.float64))
    assert "torch.float64 weights" in str(kernel.decoder(replace(d, layers=(wide,))))
    narrow = replace(d.layers[0], mlp=replace(d.layers[0].mlp, down=d.layers[0].out))
    assert "contradict" in str(kernel.decoder(replace(d, layers=(narrow,))))
    assert "sizes or types" in str(kernel.decoder(replace(d, heads=3)))
    assert other.decoder(d) == f"kernel '{other.name}' multiplies one weight at a time"


def test_wrong_caches_and_tokens_are_refused_before_they_are_read() -> None:
    d, _ = build(KERNELS[0], W4, SHAPES["dim64"], interleaved=False, sandwich=False)
    step = NativeDecoder(d, KERNELS[0].isa)
    good = [torch.zeros(2, 4, 64) for _ in range(2)]
    for bad in ([good[0], torch.zeros(2, 5, 64)], [good[0], torch.zeros(2, 4, 32)], [torch.zeros(2, 4, 64).half()] * 2):
        with pytest.raises(ConfigError, match="native decoder: a cache of"):
            step.bind(good, bad)
    cache, (cos, sin) = step.bind(good, good), angles(1, 64)
    x = torch.zeros(d.hidden)
    for wrong in ((x[1:], cos[0], sin[0]), (x, cos[0, 1:], sin[0]), (x.double(), cos[0], sin[0])):
        with pytest.raises(ConfigError, match="expected contiguous float32"):
            step.run(*wrong, cache, 0)
    for length in (-1, 4):
        with pytest.raises(ConfigError, match="contradict"):
            step.run(x, cos[0], sin[0], cache, length)


def test_every_instruction_set_that_runs_here_is_among_the_cases() -> None:
    assert {k.isa for k in KERNELS} == {isa for isa in range(6) if native_library.supported(isa)}


def test_a_library_of_another_version_is_said_to_be_one() -> None:
    with pytest.raises(BackendError, match=r"of another version, without tl_packed_bytes; '.*' renews them"):
        native_library.load.__wrapped__(Path(torch._C.__file__))
