"""Nothing waits for the device: products are captured in CUDA graphs, and torch.compile keeps one graph around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from gpu_under_test import GPU, INTERPRETED
from torch.utils._python_dispatch import TorchDispatchMode

from transload import reference
from transload.quant import ActSpec, QuantSpec, Zero
from transload.runtime.experts import PROJECTIONS, QuantExperts
from transload.runtime.placement import Target
from transload.testing import Case, nmse
from transload_cuda.triton_kernel import TritonA8, TritonA16, TritonKernel

SYM = QuantSpec(4, 64)
SPECS = [
    SYM, replace(SYM, act=ActSpec()), replace(SYM, act=ActSpec(group_size=64)),
    QuantSpec(4, 32, zero=Zero.CODES, act_order=True),
]  # fmt: skip
COUNTS = (3, 0, 5)

# Operators whose result, or the size of it, is needed in host memory: on a GPU each of them waits for the device.
WAITING = ("_local_scalar_dense", "nonzero", "bincount", "unique", "masked_select", "repeat_interleave.Tensor", "equal")


class Refuse(TorchDispatchMode):
    """Fails on every operator that would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).removeprefix("aten.")
        assert not name.startswith(WAITING), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@contextmanager
def nothing_waits() -> Iterator[None]:
    """CUDA's own check on a GPU; under the interpreter, none of the operators that would fail it."""
    if INTERPRETED:
        with Refuse():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def product_of(spec: QuantSpec, counts: tuple[int, ...] | None) -> tuple[Callable[..., torch.Tensor], list[Any], Case]:
    """(product, its operands on the device, the case)."""
    kernel: TritonKernel = TritonA8() if spec.act else TritonA16()
    case = Case(spec, m=8, n=40, k=256, counts=counts, bias=True)
    data = case.operands()
    packed = kernel.place(kernel.pack(data.weight), GPU.at)
    x, bias, given = (None if t is None else t.to(GPU.at) for t in (data.x, data.bias, data.counts))

    def product(x: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
        if counts is None:
            return kernel.matmul(x.relu(), packed, bias) * 2
        return kernel.grouped_matmul(x.relu(), packed, counts, bias) * 2

    return product, [x, given], case


def experts_on_the_device(scheme: str) -> QuantExperts:
    """Four experts of 64 -> 32 -> 64 on the kernels under test."""

    def gate(gate_up: torch.Tensor) -> torch.Tensor:
        left, right = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(left) * right

    experts = QuantExperts(4, gate)
    to = Target(GPU.backend, GPU.device, scheme)
    for name, n, k in zip(PROJECTIONS, (64, 64), (64, 32), strict=True):
        experts.fill(name, Case(QuantSpec(4, 32), n=n, k=k, counts=(1, 1, 1, 1)).operands().weight, to)
    return experts


PRODUCTS = pytest.mark.parametrize(
    ("spec", "counts"),
    [(spec, counts) for spec in SPECS for counts in (None, COUNTS) if not (counts and spec.act_order)],
    ids=lambda v: str(v) if isinstance(v, QuantSpec) else "experts" if v else "dense",
)


@PRODUCTS
def test_no_product_waits_for_the_device(spec: QuantSpec, counts: tuple[int, ...] | None) -> None:
    product, operands, _ = product_of(spec, counts)
    product(*operands)  # compiles
    with nothing_waits():
        y = product(*operands)
    assert y.shape == (8, 40)


@PRODUCTS
def test_torch_compile_keeps_one_graph(spec: QuantSpec, counts: tuple[int, ...] | None) -> None:
    product, (x, given), _ = product_of(spec, counts)
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    assert torch.equal(compiled(x, given), product(x, given))
    if counts is None:
        assert compiled(x[:0], given).shape == (0, 40)
    torch._dynamo.reset()


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_an_expert_layer_waits_for_nothing_and_is_one_graph(scheme: str) -> None:
    experts = experts_on_the_device(scheme)
    random = torch.Generator().manual_seed(1)
    x, weights = torch.randn(3, 64, generator=random).to(GPU.at), torch.rand(3, 2, generator=random).to(GPU.at)
    chosen = torch.tensor(((4, 1), (0, 3), (3, 4)), device=GPU.at)  # expert 4 is not here, expert 2 is idle
    truth = experts(x, chosen, weights)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager" if INTERPRETED else "inductor")
    assert nmse(compiled(x, chosen, weights).cpu(), truth.cpu()) < 1e-9
    torch._dynamo.reset()
    if not INTERPRETED:  # in host memory, the layer takes another way
        with nothing_waits():
            experts(x, chosen, weights)


if not INTERPRETED:

    @PRODUCTS
    def test_products_are_captured_in_a_cuda_graph(spec: QuantSpec, counts: tuple[int, ...] | None) -> None:
        product, (x, given), case = product_of(spec, counts)
        wanted = product(x, given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = product(x, given)
        y.zero_()
        graph.replay()
        assert torch.equal(y, wanted)
        if given is not None:  # other counts, the same graph
            data = case.operands()
            given.copy_(torch.tensor([0, 8, 0]))
            graph.replay()
            truth = reference.grouped_matmul(data.x.relu(), data.weight, given.cpu(), data.bias) * 2
            assert nmse(y.cpu(), truth) < 1e-5
