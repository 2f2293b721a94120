"""What the kernels take, what they refuse and in which words; and that packing loses nothing. No NPU is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from transload.errors import NoKernel, Unsupported
from transload.hal import Device, Problem, choose
from transload.quant import PER_CHANNEL, ActSpec, Grid, QTensor, QuantSpec, Zero
from transload.testing import CASES, Case, run_case
from transload_ascend import backend
from transload_ascend.casts import Casts
from transload_ascend.w4a16 import W4A16

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOKEN = ActSpec()
KERNELS = {kernel.name: kernel for kernel in backend.kernels}


def _device(arch: str) -> Device:
    return Device("ascend", 0, f"Ascend{arch}", arch, 64 << 30, 61 << 30)


A2 = _device("910B")


def _problem(spec: QuantSpec, n: int = 192, k: int = 512, x: torch.dtype = BF16, experts: int | None = None) -> Problem:
    return Problem(n, k, spec, x, None, experts)


ASYM = QuantSpec(4, 32, zero=Zero.CODES)
G128, G256, CHANNEL = QuantSpec(4, 128), QuantSpec(4, 256), QuantSpec(4, PER_CHANNEL)
W4A8_256 = QuantSpec(4, 256, scale_dtype=BF16, act=TOKEN)
W8A8 = QuantSpec(8, PER_CHANNEL, act=TOKEN)

CHOSEN = [
    (_problem(G128), "ascend-w4a16"),
    (_problem(CHANNEL), "ascend-w4a16"),
    (_problem(replace(G128, zero=Zero.CODES)), "ascend-w4a16"),
    (_problem(replace(G128, act_order=True)), "ascend-w4a16"),
    (_problem(G128, n=151936), "ascend-w4a16-wide"),
    (_problem(replace(CHANNEL, act_order=True), n=65536), "ascend-w4a16-wide"),
    (_problem(W4A8_256), "ascend-w4a8"),
    (_problem(W8A8), "ascend-w8a8"),
    (_problem(replace(CHANNEL, act=TOKEN), experts=4), "ascend-grouped-w4a8"),
    (_problem(QuantSpec(4, 256, scale_dtype=FP16, act=TOKEN), experts=4), "ascend-grouped-w4a8"),
    (_problem(G128, experts=4), "ascend-grouped-w4a16"),
    (_problem(W8A8, experts=4), "ascend-grouped-w8a8"),
]


@pytest.mark.parametrize(("problem", "name"), CHOSEN, ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("arch", ["910B", "910C"])
def test_the_chosen_kernel_executes_the_scheme_that_was_asked_for(problem: Problem, name: str, arch: str) -> None:
    choice = choose(backend, problem, _device(arch))
    assert choice.kernel.name == name
    assert choice.kernel.executed(problem) == problem.spec.scheme


REFUSED = [
    ("ascend-w4a8", _problem(replace(G128, scale_dtype=BF16, act=TOKEN)), "groups of 256 only, not 128"),
    ("ascend-w4a8", _problem(replace(G256, act=TOKEN)), "19-bit floats"),
    ("ascend-w4a8", _problem(replace(W4A8_256, zero=Zero.CODES)), "symmetric weights only"),
    ("ascend-w4a8", _problem(replace(W4A8_256, act=ActSpec(group_size=256))), "per token only"),
    ("ascend-w4a8", _problem(replace(W4A8_256, act_order=True)), "W4A16 takes it"),
    ("ascend-w4a8", _problem(W4A8_256, k=640), "K is a multiple of 256"),
    ("ascend-w4a8", _problem(W4A8_256, x=FP32), "x is float16 or bfloat16"),
    ("ascend-w4a16", _problem(W4A8_256), "16-bit activations only"),
    ("ascend-w4a16", _problem(G128, x=FP32), "x is float16 or bfloat16; found x_dtype=float32"),
    ("ascend-w4a16", _problem(G128, x=FP16), "use bfloat16 activations"),
    ("ascend-w4a16", _problem(QuantSpec(4, 48)), "a multiple of 32 from 32 on; found group_size=48"),
    ("ascend-w4a16", _problem(QuantSpec(4, 128, zero=Zero.MINS)), "not mins"),
    ("ascend-w4a16", _problem(QuantSpec(4, 64, Grid.NF4, Zero.NONE)), "not 4-bit nf4"),
    ("ascend-w4a16", _problem(G128, n=100), "a multiple of 8; found n=100"),
    ("ascend-w4a16", _problem(G128, n=151936), "K and N are at most 65535; found k=512, n=151936"),
    ("ascend-w4a16-wide", _problem(G128), "layers of more than 65535 outputs only"),
    ("ascend-w4a16-wide", _problem(G128, n=70001), "a multiple of 8"),
    ("ascend-w4a16-nz", _problem(G256), "groups of 64 or 128 (others fail with EZ1001"),
    ("ascend-w4a16-nz", _problem(G128, n=200), "N of a FRACTAL_NZ weight per group is a multiple of 64"),
    ("ascend-w4a16-nz", _problem(CHANNEL, n=200), "rows are a multiple of 16"),
    ("ascend-w4a16-nz", _problem(CHANNEL, k=480), "a row is a multiple of 32 bytes"),
    ("ascend-w8a8", _problem(QuantSpec(8, 128, act=TOKEN)), "one scale per channel only"),
    ("ascend-w8a8", _problem(W8A8, n=65536), "split wider layers"),
    ("ascend-grouped-w4a8", _problem(replace(G256, act=TOKEN), experts=4), "scales per group are float16"),
    ("ascend-grouped-w4a8", _problem(replace(CHANNEL, act=TOKEN), experts=1), "counts (1) of at least two experts"),
    ("ascend-grouped-w4a16", _problem(G128, k=500, experts=4), "K=500 is no multiple of 128"),
    ("ascend-grouped-w4a16", _problem(G128), "stacked experts only"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "problem", "words"), REFUSED)
def test_a_refusal_says_what_the_operator_cannot_do(name: str, problem: Problem, words: str) -> None:
    reason = KERNELS[name].refuses(problem, A2)
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize("arch", ["310P", "950", "910A"])
@pytest.mark.parametrize("spec", [G128, CHANNEL, W4A8_256], ids=["W4A16-g128", "W4A16-channel", "W4A8"])
@pytest.mark.parametrize("experts", [None, 4], ids=["dense", "experts"])
def test_only_910b_and_910c_take_four_bits(arch: str, spec: QuantSpec, experts: int | None) -> None:
    with pytest.raises(NoKernel):
        choose(backend, _problem(spec, experts=experts), _device(arch))


def test_310p_refuses_four_bits_and_names_w8a8_which_it_takes() -> None:
    reason = KERNELS["ascend-w4a16"].refuses(_problem(replace(G128, scale_dtype=FP16), x=FP16), _device("310P"))
    assert reason is not None
    assert "on 310P choose W8A8" in reason
    assert choose(backend, _problem(W8A8, x=FP16), _device("310P")).kernel.name == "ascend-w8a8"
    assert "310P has no bfloat16 matmul" in str(KERNELS["ascend-w8a8"].refuses(_problem(W8A8), _device("310P")))


def _halves(case: Case) -> Case:
    return replace(case, x_dtype=BF16) if case.x_dtype == FP32 else case


TAKEN = [
    (kernel, case)
    for kernel in backend.kernels
    for case in map(_halves, CASES)
    if kernel.refuses(case.problem, A2) is None
]


@pytest.mark.parametrize(("kernel", "case"), TAKEN, ids=lambda v: getattr(v, "name", None) or v.id)
def test_packing_loses_nothing(kernel: object, case: Case) -> None:
    result = run_case(backend, A2, kernel, case, layout_only=True)  # type: ignore[arg-type]
    assert result.passed, result.failed


def test_packing_has_cases_for_every_kernel() -> None:
    assert {kernel.name for kernel, _ in TAKEN} >= set(KERNELS) - {
        "ascend-w4a8",
        "ascend-w4a16-wide",
        "ascend-grouped-w4a8",
    }


@pytest.mark.parametrize("spec", [replace(ASYM, act_order=True), CHANNEL], ids=["asym-order", "channel"])
def test_a_wide_head_is_packed_in_parts_and_comes_back(spec: QuantSpec) -> None:
    case = Case(spec, m=1, n=65600, k=64, x_dtype=BF16)
    result = run_case(backend, A2, KERNELS["ascend-w4a16-wide"], case, layout_only=True)
    assert result.passed, result.failed
    packed = KERNELS["ascend-w4a16-wide"].pack(case.operands().weight).tensors
    assert {name for name in packed if name.startswith("weight")} == {"weight_0", "weight_1"}


def test_a_cast_scale_is_made_once_and_forgotten_with_its_source() -> None:
    cast, scales = Casts(), torch.rand(4)
    made = cast(scales, BF16)
    assert cast(scales, BF16) is made
    assert cast(made, BF16) is made
    assert cast(scales, FP16).dtype == FP16
    key = id(scales)
    del scales
    assert key not in cast._made


def test_act_order_with_groups_of_unequal_sizes_is_refused_when_packing() -> None:
    g_idx = torch.zeros(256, dtype=torch.int32)
    g_idx[200:] = 1
    w = QTensor(
        replace(G128, act_order=True), torch.zeros(8, 256, dtype=torch.uint8), torch.ones(8, 2), None, None, g_idx
    )
    with pytest.raises(Unsupported, match="unequal sizes"):
        W4A16().pack(w)
