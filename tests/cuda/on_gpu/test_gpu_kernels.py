"""What the conformance cases leave out: exact activations, splits of K, and bad operands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from gpu_under_test import GPU

from transload import reference
from transload.errors import ConfigError
from transload.hal import Device, Problem
from transload.quant import ActSpec, Grid, QuantSpec, Zero
from transload.testing import Case, nmse
from transload_cuda import layouts
from transload_cuda.configs import Config
from transload_cuda.jit import launch
from transload_cuda.jit.ops import matmul_op
from transload_cuda.triton_kernel import TritonA8, TritonA16, TritonKernel

SYM = QuantSpec(4, 64)
A16, A8 = TritonA16(), TritonA8()
TF32 = 1e-5  # float32 x loses 13 bits in a tensor core: a mean square of 3e-7, and more where terms cancel


def kernel_for(spec: QuantSpec) -> TritonKernel:
    return A8 if spec.act else A16


@pytest.mark.parametrize(
    ("act", "k"),
    [(ActSpec(), 200), (ActSpec(), 256), (ActSpec(group_size=64), 200), (ActSpec(group_size=96), 288)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_activations_are_quantized_exactly_as_the_reference_does(act: ActSpec, k: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, k, generator=torch.Generator().manual_seed(1)) * 3).to(dtype)
    x[1], x[2, 0], x[3, -1] = 0, torch.nan, torch.inf
    x[4] = torch.arange(k) % 255 - 127 + 0.5  # halves: rounded to even
    g = layouts.geometry(k, QuantSpec(4, 32, act=act))
    q, scales, sums = launch.quantize(x.to(GPU.at), g, 32, None)
    wanted, wanted_scales = reference.quantize_activation(x, act)
    assert torch.equal(q[:, :k].cpu(), wanted)
    assert q[:, k:].count_nonzero() == 0
    found = scales.T.cpu()[:, : wanted_scales.shape[1]]
    assert torch.equal(found.nan_to_num(-1), wanted_scales.nan_to_num(-1))
    assert torch.equal(sums.cpu(), q.cpu().int().unflatten(1, (-1, 32)).sum(-1).T)


@pytest.mark.parametrize("spec", [
    SYM, replace(SYM, act=ActSpec()), QuantSpec(4, 32, zero=Zero.MINS), QuantSpec(8, -1, zero=Zero.CODES, act=ActSpec())
], ids=str)  # fmt: skip
def test_any_tiles_and_splits_give_the_same_product(spec: QuantSpec) -> None:
    data = Case(spec, m=18, n=40, k=512, bias=True).operands()
    packed = kernel_for(spec).place(layouts.pack("t", data.weight), GPU.at)
    truth = reference.matmul(data.x, data.weight, data.bias)
    assert data.bias is not None
    for config in (Config(16, 64, 32, splits=3), Config(32, 16, 32, splits=1)):
        y = launch.multiply(data.x.to(GPU.at), packed.tensors, spec, 40, data.bias.to(GPU.at), None, config)
        assert nmse(y.cpu(), truth) < (1e-9 if spec.act else TF32)


def test_rows_that_belong_to_no_expert_give_zeros() -> None:
    data = Case(SYM, m=6, n=24, counts=(2, 0, 4)).operands()
    packed = A16.place(A16.pack(data.weight), GPU.at)
    counts = torch.tensor([2, 0, 1], device=GPU.at)
    y = A16.grouped_matmul(data.x.to(GPU.at), packed, counts).cpu()
    assert y[3:].count_nonzero() == 0
    assert nmse(y[:3], reference.grouped_matmul(data.x[:3], data.weight, counts.cpu())) < TF32


@pytest.mark.parametrize("act", [ActSpec(), ActSpec(group_size=64)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gated_experts_quantize_what_their_gate_gives(act: ActSpec, dtype: torch.dtype) -> None:
    spec = replace(SYM, act=act)
    counts = (2, 0, 3)
    up = Case(spec, m=5, n=2 * 192, k=128, counts=counts).operands()
    down = Case(spec, m=5, n=40, k=192, counts=counts).operands()
    weights = [A8.place(A8.pack(data.weight), GPU.at) for data in (up, down)]
    there, x = torch.tensor(counts, device=GPU.at), up.x.to(GPU.at, dtype)
    left, right = A8.grouped_matmul(x, weights[0], there).float().chunk(2, -1)
    truth = reference.grouped_matmul((torch.nn.functional.silu(left) * right).cpu(), down.weight, torch.tensor(counts))
    y = A8.swiglu_experts(x, *weights, there)
    assert y is not None
    assert y.dtype == dtype
    assert nmse(y.cpu().float(), truth) < (1e-5 if dtype == torch.bfloat16 else 1e-6)  # bfloat16: y's own rounding


def test_counts_beyond_the_rows_of_x_write_nothing_outside() -> None:
    data = Case(SYM, m=3, n=24, counts=(2, 1)).operands()
    packed = A16.place(A16.pack(data.weight), GPU.at)
    for wrong in ((2, 900), (-5, 3), (2**40, 1)):
        y = A16.grouped_matmul(data.x.to(GPU.at), packed, torch.tensor(wrong, device=GPU.at))
        assert y.shape == (3, 24)


def test_operands_that_do_not_fit_are_refused() -> None:
    w = Case(SYM, n=24, k=256).operands().weight
    packed = A16.place(A16.pack(w), GPU.at)
    x = torch.randn(3, 256, device=GPU.at)
    for call, words in (
        (lambda: A16.matmul(x[:, :128], packed), r"x is \(3, 128\), expected \[M, 256\]"),
        (lambda: A16.matmul(x[0], packed), r"x is \(256,\)"),
        (lambda: A16.matmul(x.double(), packed), "x is torch.float64"),
        (lambda: A16.matmul(x, packed, torch.zeros(3, device=GPU.at)), "bias has shape"),
        (lambda: A16.grouped_matmul(x, packed, torch.tensor([3], device=GPU.at)), "counts"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


def test_strided_rows_are_read_in_place_and_strided_columns_are_copied() -> None:
    data = Case(SYM, m=4, n=24, k=256).operands()
    packed = A16.place(A16.pack(data.weight), GPU.at)
    truth = reference.matmul(data.x, data.weight)
    wide = torch.full((4, 600), torch.nan)
    wide[:, 40:296] = data.x
    across = torch.full((256, 9), torch.nan)
    across[:, 2:6] = data.x.T
    for x in (wide.to(GPU.at)[:, 40:296], across.to(GPU.at)[:, 2:6].T, data.x[:1].to(GPU.at).expand(4, 256)):
        wanted = truth if x.stride(0) else truth[:1].expand(4, 24)
        assert nmse(A16.matmul(x, packed).cpu(), wanted) < TF32


@pytest.mark.parametrize(
    ("kernel", "problem", "arch", "words"),
    [
        (A16, Problem(8, 256, SYM), "sm_75", "compute capability 8.0 or later, Some GPU is sm_75"),
        (A16, Problem(8, 256, SYM, torch.float64), "sm_90", "not torch.float64"),
        (A16, Problem(8, 256, replace(SYM, act=ActSpec())), "sm_90", "triton-a8 takes int8"),
        (A16, Problem(8, 256, QuantSpec(4, 64, Grid.NF4, Zero.NONE)), "sm_90", "integer codes, not nf4"),
        (A16, Problem(8, 256, SYM, experts=0), "sm_90", "no experts"),
        (A8, Problem(8, 256, SYM), "sm_90", "triton-a16 takes them"),
        (A8, Problem(8, 256, QuantSpec(4, 16, act=ActSpec())), "sm_90", "groups of 16 are not a multiple of 32"),
        (A8, Problem(8, 256, replace(SYM, act=ActSpec(static=True))), "sm_90", "static"),
        (A8, Problem(8, 70000, replace(SYM, act=ActSpec())), "sm_90", "overflow"),
        (A8, Problem(8, 256, QuantSpec(4, 64, act=ActSpec(group_size=64), act_order=True)), "sm_90", "act-order"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_refusals_are_sentences(kernel: TritonKernel, problem: Problem, arch: str, words: str) -> None:
    device = Device("cuda", 0, "Some GPU", arch, 1 << 30, 1 << 30)
    assert words in str(kernel.refuses(problem, device))


def test_the_operator_describes_itself_truly() -> None:
    data = Case(SYM, m=4, n=24, k=256, counts=(1, 3)).operands()
    t = {name: value.to(GPU.at) for name, value in A16.pack(data.weight).tensors.items()}
    assert data.counts is not None
    given = (data.x.to(GPU.at), t["codes"], t["scales"], None, None, None, None, data.counts.to(GPU.at))
    torch.library.opcheck(matmul_op, (*given, 24, 4, 64, "midpoint", 0))
