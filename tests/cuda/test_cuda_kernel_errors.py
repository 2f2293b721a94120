"""What the Triton kernels say on a machine that cannot run them."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from transload.errors import BackendError, ConfigError, NoKernel
from transload.hal import Device, Kernel, Packed, Problem, choose
from transload.quant import ActSpec, Grid, QuantSpec, Zero
from transload.testing import Case
from transload_cuda import triton_kernel
from transload_cuda.backend import backend
from transload_cuda.device import on_device
from transload_cuda.int4pack_kernel import Int4PackKernel
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


EVERY_KERNEL = pytest.mark.parametrize("kernel", backend.kernels, ids=lambda k: k.name)


def packed_for(kernel: Kernel) -> Packed:
    act = ActSpec() if kernel.name == "triton-a8" else None
    return kernel.pack(Case(replace(SYM, act=act), n=64, k=256).operands().weight)


@EVERY_KERNEL
def test_operands_that_do_not_fit_are_named_by_every_kernel(kernel: Kernel) -> None:
    packed = packed_for(kernel)
    x = torch.zeros(3, 256, dtype=torch.bfloat16)
    for given, bias, words in (
        (x[:, :128], None, rf"kernel '{kernel.name}': x is \(3, 128\), expected \[M, 256\]"),
        (x[0], None, r"x is \(256,\), expected"),
        (x.to("meta"), None, r"operands are on \['cpu', 'meta'\]; move them to one device"),
        (x, torch.zeros(3, dtype=torch.bfloat16), r"bias has shape \(3,\), expected \(64,\)"),
    ):
        with pytest.raises(ConfigError, match=words):
            kernel.matmul(given, packed, bias)


@EVERY_KERNEL
def test_no_rows_give_no_rows(kernel: Kernel) -> None:
    assert kernel.matmul(torch.zeros(0, 256, dtype=torch.bfloat16), packed_for(kernel)).shape == (0, 64)


@pytest.mark.parametrize("name", ["humming", "torch-int4pack"])
def test_a_weight_that_is_not_on_a_gpu_is_named(name: str) -> None:
    (kernel,) = (k for k in backend.kernels if k.name == name)
    with pytest.raises(ConfigError, match=f"kernel '{name}': the weight is as packed on the host; place it on a GPU"):
        kernel.matmul(torch.zeros(3, 256, dtype=torch.bfloat16), packed_for(kernel))


def test_int4pack_says_where_it_runs() -> None:
    kernel = Int4PackKernel()
    with pytest.raises(ConfigError, match="it runs on CUDA devices, not on cpu"):
        kernel.place(packed_for(kernel), torch.device("cpu"))


def test_a_gpu_before_ampere_runs_what_torch_runs_and_refuses_the_rest() -> None:
    turing = replace(H200, model="Tesla T4", arch="sm_75")
    assert choose(backend, Problem(4096, 4096, SYM, torch.float16), turing).kernel.name == "dequantize"
    with pytest.raises(
        NoKernel, match=r"triton-a8: .*compute capability 8.0 or later, Tesla T4 is sm_75|triton is not"
    ):
        choose(backend, Problem(4096, 4096, replace(SYM, act=ActSpec()), torch.float16), turing)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_a_product_without_room_names_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from transload_cuda.jit import launch

    def full(*operands: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(launch, "multiply", full)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    kernel = TritonA16()
    with pytest.raises(
        BackendError, match=r"'triton-a16': the GPU has no room for x \[M=3, K=256\] to y \[N=64\]: CUDA"
    ):
        kernel.matmul(torch.zeros(3, 256, dtype=torch.bfloat16), packed_for(kernel))


def test_a_weight_without_room_names_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: torch.Tensor, *where: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    kernels = [k for k in backend.kernels if k.name not in ("humming", "torch-int4pack")]
    weights = [packed_for(kernel) for kernel in kernels]
    monkeypatch.setattr(torch.Tensor, "to", full)
    for kernel, packed in zip(kernels, weights, strict=True):
        with pytest.raises(
            BackendError, match=f"'{kernel.name}': the GPU has no room for {packed.nbytes} bytes of weight"
        ):
            kernel.place(packed, torch.device("cuda"))
