"""Experts in the native decoder against the same arithmetic in torch, on every instruction set of this processor."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from torch import Tensor

from transload.hal import Decoder, DecoderExperts, DecoderLayer, DecoderLinear, DecoderMlp, Packed
from transload.quant import ActSpec, QuantSpec, Zero, stack_experts
from transload.reference import quantize_rtn
from transload_cpu import native_library
from transload_cpu.native_decoder import NativeDecoder
from transload_cpu.native_kernel import NATIVE_KERNELS, NativeKernel, NativePortable

if native_library.unavailable():
    pytest.skip(str(native_library.unavailable()), allow_module_level=True)

KERNELS = [k for k in (*NATIVE_KERNELS, NativePortable()) if native_library.supported(k.isa)]
HIDDEN, WIDTH, SHARED, EXPERTS = 72, 40, 56, 12
SCHEMES = {
    "w4a16": QuantSpec(4, 8),
    "w4a8": QuantSpec(4, 8, zero=Zero.CODES, act=ActSpec(group_size=8)),
    "w8a8-per-token-mins": QuantSpec(8, 24, zero=Zero.MINS, act=ActSpec()),
}
ROUTERS: dict[str, dict[str, object]] = {
    "softmax": {"top_k": 3},
    "softmax-not-normalized": {"top_k": 4, "normalized": False},
    "all-experts": {"top_k": EXPERTS},
    "sigmoid-groups": {"top_k": 3, "sigmoid": True, "groups": 4, "top_groups": 2, "scaling": 1.8},
    "sigmoid-all-of-its-groups": {"top_k": 4, "sigmoid": True, "groups": 6, "top_groups": 2, "normalized": False},
}

Floats = tuple[Tensor, Tensor]  # gate_up, down


def weight(kernel: NativeKernel, spec: QuantSpec | None, *shape: int) -> tuple[Packed | Tensor, Tensor]:
    """A random weight [N, K] or [E, N, K], packed where there is a scheme, and its numbers in float64."""
    floats = torch.randn(shape) * shape[-1] ** -0.5
    if spec is None:
        return floats, floats.double()
    w = quantize_rtn(floats, spec) if floats.dim() == 2 else stack_experts([quantize_rtn(e, spec) for e in floats])
    return kernel.pack(w), w.dequantize().double()


def alone(weight: Packed | Tensor) -> DecoderLinear:
    return DecoderLinear(((weight, None),))


def mlp(kernel: NativeKernel, spec: QuantSpec | None, *experts: int, width: int) -> tuple[DecoderMlp, Floats]:
    gate_up, down = weight(kernel, spec, *experts, 2 * width, HIDDEN), weight(kernel, spec, *experts, HIDDEN, width)
    return DecoderMlp(alone(gate_up[0]), alone(down[0])), (gate_up[1], down[1])


def decoder(shared: DecoderMlp | None, experts: DecoderExperts) -> Decoder:
    """One layer whose attention adds nothing: what is left is the MLP."""
    ones, dim = torch.ones(HIDDEN), 8
    qkv, out = alone(torch.zeros(3 * dim, HIDDEN)), alone(torch.zeros(HIDDEN, dim))
    layer = DecoderLayer(ones, None, None, None, ones, None, qkv, out, shared, experts)
    return Decoder((layer,), ones, HIDDEN, 1, 1, dim, 0, False, 1e-6, 1.0)


def run(d: Decoder, kernel: NativeKernel, xs: Tensor) -> Tensor:
    step = kernel.decoder(d)
    assert isinstance(step, NativeDecoder), step
    cache = step.bind([torch.zeros(1, 1, d.head_dim)], [torch.zeros(1, 1, d.head_dim)])
    return torch.stack([step.run(x, torch.zeros(0), torch.zeros(0), cache, 0) for x in xs])


def prompt(d: Decoder, kernel: NativeKernel, xs: Tensor) -> Tensor:
    """The tokens in one call. Attention adds nothing, so each comes out as alone."""
    step = kernel.decoder(d)
    assert isinstance(step, NativeDecoder), step
    room = (1, len(xs), d.head_dim)
    cache = step.bind([torch.zeros(room)], [torch.zeros(room)])
    return step.run_many(xs, torch.zeros(len(xs), 0), torch.zeros(len(xs), 0), cache, 0)


def both(d: Decoder, kernel: NativeKernel, xs: Tensor) -> Tensor:
    """The tokens one by one, and in one call."""
    return torch.cat([run(d, kernel, xs), prompt(d, kernel, xs)])


def normed(x: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def gated(x: Tensor, w: Floats) -> Tensor:
    gate, up = (w[0] @ x).chunk(2)
    return w[1] @ (torch.nn.functional.silu(gate) * up)


def reference(e: DecoderExperts, x: Tensor, floats: Floats, shared: Floats | None) -> Tensor:
    """One token in float64, as hal.DecoderExperts says it."""
    x = x.double()
    y = normed(x)
    logits = e.router.parts[0][0].double() @ y
    scores = logits.sigmoid() if e.sigmoid else logits.softmax(0)
    choice = scores + (0 if e.bias is None else e.bias.double())
    best = choice.view(e.groups, -1).topk(2).values.sum(1).topk(e.top_groups).indices
    outside = torch.ones(e.groups, dtype=torch.bool)
    outside[best] = False
    choice = choice.masked_fill(outside.repeat_interleave(len(choice) // e.groups), -torch.inf)
    chosen = choice.topk(e.top_k).indices
    weights = scores[chosen] / (scores[chosen].sum() if e.normalized else 1) * e.scaling
    out = sum(w * gated(y, (floats[0][i], floats[1][i])) for w, i in zip(weights, chosen, strict=True))
    if shared is not None:
        often = 1.0 if e.shared_gate is None else (e.shared_gate.parts[0][0].double() @ y).sigmoid()
        out = out + often * gated(y, shared)
    return normed(x + out)


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("router", ROUTERS)
def test_experts_are_chosen_and_weighed_as_in_torch(kernel: NativeKernel, scheme: str, router: str) -> None:
    torch.manual_seed(0)
    spec, settings = SCHEMES[scheme], ROUTERS[router]
    each, floats = mlp(kernel, spec, EXPERTS, width=WIDTH)
    shared, shared_floats = mlp(kernel, spec, width=SHARED)
    e = DecoderExperts(alone(torch.randn(EXPERTS, HIDDEN)), each, **settings)  # type: ignore[arg-type]
    if e.sigmoid:
        e = replace(e, bias=0.1 * torch.randn(EXPERTS))
    xs = torch.randn(20, HIDDEN)
    limit = 5e-4 if spec.act is None else 3e-2  # 15-bit activations, or 8-bit ones in two products
    want = torch.stack([reference(e, x, floats, None) for x in xs])
    assert error(both(decoder(None, e), kernel, xs), want.repeat(2, 1)) < limit
    want = torch.stack([reference(e, x, floats, shared_floats) for x in xs])
    assert error(both(decoder(shared, e), kernel, xs), want.repeat(2, 1)) < limit
    e = replace(e, shared_gate=alone(torch.randn(1, HIDDEN)))
    want = torch.stack([reference(e, x, floats, shared_floats) for x in xs])
    assert error(both(decoder(shared, e), kernel, xs), want.repeat(2, 1)) < limit


def test_experts_of_floats_and_of_two_widths() -> None:
    torch.manual_seed(0)
    kernel, router = KERNELS[0], alone(torch.randn(EXPERTS, HIDDEN).bfloat16())
    xs = torch.randn(20, HIDDEN)
    each, floats = mlp(kernel, None, EXPERTS, width=WIDTH)
    e = DecoderExperts(router, each, top_k=3)
    want = torch.stack([reference(e, x, floats, None) for x in xs])
    assert error(both(decoder(None, e), kernel, xs), want.repeat(2, 1)) < 1e-5
    gate, up = weight(kernel, QuantSpec(8, 8), EXPERTS, WIDTH, HIDDEN), weight(kernel, None, EXPERTS, WIDTH, HIDDEN)
    e = replace(e, each=DecoderMlp(DecoderLinear(((gate[0], None), (up[0], None))), each.down))
    floats = (torch.cat([gate[1], up[1]], dim=1), floats[1])
    want = torch.stack([reference(e, x, floats, None) for x in xs])
    assert error(both(decoder(None, e), kernel, xs), want.repeat(2, 1)) < 5e-4


@pytest.mark.parametrize("router", ROUTERS)
def test_equal_scores_and_numbers_that_are_none(router: str) -> None:
    torch.manual_seed(0)
    kernel, settings = KERNELS[0], ROUTERS[router]
    each, floats = mlp(kernel, None, EXPERTS, width=WIDTH)
    e = DecoderExperts(alone(torch.zeros(EXPERTS, HIDDEN)), each, **settings)  # type: ignore[arg-type]
    x = torch.randn(1, HIDDEN)
    got = run(decoder(None, e), kernel, x)[0]
    # Whichever are chosen, their weights are equal: one of the sets of top_k experts explains the result.
    y = normed(x[0].double())
    outs = torch.stack([gated(y, (floats[0][i], floats[1][i])) for i in range(EXPERTS)])
    score = 0.5 if e.sigmoid else 1 / EXPERTS
    weight = (1 / e.top_k if e.normalized else score) * e.scaling
    sets = torch.tensor(list(combinations(range(EXPERTS), e.top_k)))
    wants = normed(x[0].double() + weight * outs[sets].sum(1))
    assert float(((wants - got).norm(dim=1) / got.norm()).min()) < 1e-5
    for bad in (torch.nan, torch.inf, -torch.inf):
        x[0, 3] = bad
        assert run(decoder(None, e), kernel, x).isnan().all()
        three = prompt(decoder(None, e), kernel, torch.cat([torch.ones(1, HIDDEN), x, torch.ones(1, HIDDEN)]))
        assert three[1].isnan().all()
        assert torch.equal(three[0], prompt(decoder(None, e), kernel, torch.ones(2, HIDDEN))[1])


def test_one_expert() -> None:
    torch.manual_seed(0)
    kernel = KERNELS[0]
    each, floats = mlp(kernel, QuantSpec(4, 8), 1, width=WIDTH)
    e = DecoderExperts(alone(torch.randn(1, HIDDEN)), each, top_k=1)
    x = torch.randn(HIDDEN)
    y = normed(x.double())
    want = normed(x + gated(y, (floats[0][0], floats[1][0])))
    assert error(run(decoder(None, e), kernel, x[None])[0], want) < 5e-4


def test_many_experts_on_any_number_of_threads_give_the_same_bits() -> None:
    torch.manual_seed(0)
    kernel, before = KERNELS[0], torch.get_num_threads()
    each, _ = mlp(kernel, QuantSpec(4, 8, act=ActSpec(group_size=8)), 200, width=256)
    shared, _ = mlp(kernel, QuantSpec(4, 8), width=SHARED)
    d = decoder(shared, DecoderExperts(alone(torch.randn(200, HIDDEN)), each, top_k=3))
    xs = torch.randn(400, HIDDEN)
    try:
        torch.set_num_threads(1)
        one = both(d, kernel, xs)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(both(d, kernel, xs), one)
    finally:
        torch.set_num_threads(before)


def test_refusals_name_what_was_found() -> None:
    torch.manual_seed(0)
    kernel = KERNELS[0]
    each, _ = mlp(kernel, QuantSpec(4, 8), EXPERTS, width=WIDTH)
    narrow, _ = mlp(kernel, QuantSpec(4, 8), EXPERTS - 1, width=WIDTH)
    good = DecoderExperts(alone(torch.randn(EXPERTS, HIDDEN)), each, top_k=3)
    assert isinstance(kernel.decoder(decoder(None, good)), NativeDecoder)
    for bad in (
        {"top_k": 0},
        {"top_k": EXPERTS + 1},
        {"groups": 5},
        {"groups": 12},
        {"groups": 4, "top_groups": 5},
        {"groups": 6},
    ):
        assert "sizes or types" in str(kernel.decoder(decoder(None, replace(good, **bad)))), bad
    wrong = (
        replace(good, each=narrow),
        replace(good, each=DecoderMlp(each.gate_up, narrow.down)),
        replace(good, shared_gate=alone(torch.randn(2, HIDDEN))),
        replace(good, router=alone(torch.randn(EXPERTS, HIDDEN + 8))),
    )
    for e in wrong:
        assert "contradict" in str(kernel.decoder(decoder(None, e)))
    short = replace(good, bias=torch.zeros(3))
    assert kernel.decoder(decoder(None, short)) == "the router has 12 outputs and a bias (3,)"
    wide = replace(good, router=alone(torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)))
    assert "the router has torch.float64 weights" in str(kernel.decoder(decoder(None, wide)))
    both_missing = replace(decoder(None, good).layers[0], experts=None)
    assert "contradict" in str(kernel.decoder(replace(decoder(None, good), layers=(both_missing,))))
