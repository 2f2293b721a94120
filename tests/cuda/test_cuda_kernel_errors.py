"""What the Triton kernels say on a machine that cannot run them."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from transload.errors import BackendError, ConfigError
from transload.hal import Device, Problem, choose
from transload.quant import ActSpec, Grid, QuantSpec, Zero
from transload.testing import Case
from transload_cuda import triton_kernel
from transload_cuda.backend import backend
from transload_cuda.device import on_device
from transload_cuda.triton_kernel import TritonA16
from transload_cuda.tune import tune

H200 = Device("cuda", 0, "NVIDIA H200", "sm_90", 141 << 30, 140 << 30)
SYM = QuantSpec(4, 128, scale_dtype=torch.bfloat16)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    packed = TritonA16().pack(Case(SYM).operands().weight)
    with pytest.raises(ConfigError, match="x is on cpu, expected a CUDA device"):
        TritonA16().matmul(torch.randn(2, 256), packed)
    assert TritonA16().matmul(torch.randn(0, 256), packed).shape == (0, 24)


def test_without_triton_the_reason_says_so_and_torchs_own_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernel, "find_spec", lambda name: None)
    problem = Problem(4096, 4096, SYM, torch.bfloat16)
    assert str(TritonA16().refuses(problem, H200)).startswith("triton is not installed")
    chosen = choose(backend, problem, H200)
    assert chosen.kernel.name == "torch-int4pack"


@pytest.mark.parametrize(
    ("spec", "experts", "name"),
    [
        (SYM, None, "triton-a16"),
        (SYM, 128, "triton-a16"),
        (QuantSpec(4, 128, act=ActSpec()), None, "triton-a8"),
        (QuantSpec(4, 128, act=ActSpec(group_size=128)), 128, "triton-a8"),
        (QuantSpec(4, 64, Grid.NF4, Zero.NONE), None, "dequantize"),
        (QuantSpec(4, 40), 8, "dequantize"),
    ],
    ids=str,
)
def test_each_scheme_gets_its_kernel(
    spec: QuantSpec, experts: int | None, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_kernel, "find_spec", lambda name: object())
    chosen = choose(backend, Problem(4096, 4096, spec, torch.bfloat16, experts=experts), H200)
    assert chosen.kernel.name == name
    assert chosen.kernel.executed(Problem(4096, 4096, spec)) == spec.scheme


def test_out_of_memory_names_the_kernel_and_the_request() -> None:
    with pytest.raises(BackendError, match=r"kernel 'k': the GPU has no room for 5 bytes of weight: CUDA out of"):  # noqa: SIM117
        with on_device("k", "5 bytes of weight"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 bytes\nmore")


def test_tuning_needs_a_gpu() -> None:
    packed = TritonA16().pack(Case(SYM).operands().weight)
    with pytest.raises(ConfigError, match="x is on cpu; times are taken on a CUDA device only"):
        tune(torch.randn(2, 256), packed)
