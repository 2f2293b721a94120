"""Input that native kernels rarely see: odd addresses, no rows, broken numbers, enormous sizes, no memory."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transload import reference
from transload.hal import Packed
from transload.quant import ActSpec, QTensor, QuantSpec
from transload_cpu import build_native, native_library
from transload_cpu.native_kernel import NATIVE_KERNELS, NativeKernel, NativePortable

if native_library.unavailable():
    pytest.skip(str(native_library.unavailable()), allow_module_level=True)

KERNELS = [k for k in (*NATIVE_KERNELS, NativePortable()) if native_library.supported(k.isa)]
each_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
FP16, FP32, BF16 = torch.float16, torch.float32, torch.bfloat16
ACTS = {"W4A16": None, "W4A8": ActSpec(8, 32), "W4A8 per token": ActSpec(8)}


def random_weight(n: int, k: int, act: ActSpec | None = None, experts: int | None = None) -> QTensor:
    random = torch.Generator().manual_seed(n)
    shape = (n, k) if experts is None else (experts, n, k)
    return reference.quantize_rtn(torch.randn(shape, generator=random), QuantSpec(4, 32, scale_dtype=FP16, act=act))


def at_odd_address(t: torch.Tensor) -> torch.Tensor:
    """The same numbers one byte behind where their type would lie."""
    memory = bytearray(t.numel() * t.element_size() + 1)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    raw[1:] = t.contiguous().view(-1).view(torch.uint8)
    return torch.frombuffer(memory, dtype=t.dtype, offset=1).view(t.shape)


@each_kernel
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_addresses_may_be_odd(kernel: NativeKernel, dtype: torch.dtype) -> None:
    """x, bias and a weight mapped from a file need no alignment."""
    w = random_weight(50, 100)
    packed = kernel.pack(w)
    x, bias = torch.randn(40, 100).to(dtype), torch.randn(50)
    expected = kernel.matmul(x, packed, bias)
    moved = Packed(packed.kernel, w.spec, 50, 100, {"packed": at_odd_address(packed.tensors["packed"])})
    assert torch.equal(kernel.matmul(at_odd_address(x), moved, at_odd_address(bias)), expected)


@each_kernel
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_no_rows_give_no_rows(kernel: NativeKernel, act: ActSpec | None) -> None:
    y = kernel.matmul(torch.randn(0, 64), kernel.pack(random_weight(24, 64, act)))
    assert (y.shape, y.dtype) == ((0, 24), FP32)


@each_kernel
@pytest.mark.parametrize("k", [1, 31, 33, 100])
def test_the_last_group_may_be_short(kernel: NativeKernel, k: int) -> None:
    for act in ACTS.values():
        w, x = random_weight(40, k, act), torch.randn(5, k, generator=torch.Generator().manual_seed(k))
        truth = reference.matmul(x, w).double()
        error = float(((kernel.matmul(x, kernel.pack(w)).double() - truth) ** 2).sum() / (truth**2).sum())
        assert error < (1e-8 if act is None else 1e-11)  # 15-bit activations are rounded, int8 sums are the reference's


@each_kernel
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_broken_rows_break_no_others(kernel: NativeKernel, dtype: torch.dtype, act: ActSpec | None) -> None:
    """Enough rows for every kernel, bfloat16's among them."""
    packed = kernel.pack(random_weight(40, 128, act))
    x = torch.randn(120, 128).to(dtype)
    good = kernel.matmul(x, packed)
    broken = [0, 7, 64, 119]
    for row, value in zip(broken, (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
        x[row, row] = value
    y = kernel.matmul(x, packed)
    rest = [i for i in range(120) if i not in broken]
    assert torch.equal(y[rest], good[rest])
    assert not bool(y[broken].isfinite().any())


@each_kernel
def test_rows_may_lie_gigabytes_apart(kernel: NativeKernel) -> None:
    """Three rows, 2**32 bytes from one to the next: of the mapped memory only the pages of the rows are ever there."""
    step, k = 1 << 30, 64
    lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    with mmap.mmap(-1, 4 * (2 * step + k), flags=lazily) as memory:
        x = torch.frombuffer(memory, dtype=FP32).as_strided((3, k), (step, 1))
        x.copy_(torch.randn(3, k))
        packed = kernel.pack(random_weight(24, k))
        assert torch.equal(kernel.matmul(x, packed), kernel.matmul(x.contiguous(), packed))
        del x


def test_experts_may_lie_gigabytes_apart() -> None:
    """The last of 2**21 experts, whose codes start behind 4 GB: its bytes are put there by hand, others stay zero."""
    kernel, experts, n, k = KERNELS[0], 1 << 21, 32, 128
    one = kernel.pack(random_weight(n, k, experts=1)).tensors["packed"]
    geometry, size = native_library.Geometry(), ctypes.c_int64()
    assert native_library.load().tl_describe(one.data_ptr(), one.numel(), ctypes.byref(geometry)) == 0
    geometry.experts = experts
    assert native_library.load().tl_packed_bytes(geometry, size) == 0
    assert size.value > 1 << 32
    codes, scales, header = n * k // 2, n * k // 32 * 2, 128
    lazily = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    with mmap.mmap(-1, size.value, flags=lazily) as memory:
        all_of_them = torch.frombuffer(memory, dtype=torch.uint8)
        head = bytearray(one[:header].numpy().tobytes())
        head[16 : 16 + ctypes.sizeof(geometry)] = bytes(geometry)
        total = 16 + ctypes.sizeof(geometry)
        head[total : total + 8] = size.value.to_bytes(8, "little")
        all_of_them[:header] = torch.frombuffer(head, dtype=torch.uint8)
        at = header + (experts - 1) * codes
        all_of_them[at : at + codes] = one[header : header + codes]
        at = header + experts * codes + (experts - 1) * scales
        all_of_them[at : at + scales] = one[header + codes : header + codes + scales]
        far = Packed(kernel.name, random_weight(n, k).spec, n, k, {"packed": all_of_them}, experts)
        near = Packed(kernel.name, far.spec, n, k, {"packed": one}, 1)
        counts, x = torch.zeros(experts, dtype=torch.int64), torch.randn(3, k)
        counts[-1] = 3
        y = kernel.grouped_matmul(x, far, counts)
        assert torch.equal(y, kernel.grouped_matmul(x, near, torch.tensor([3])))
        del all_of_them, far


@pytest.mark.parametrize("m", [1 << 45, 1 << 62], ids=["2**45", "2**62"])
def test_more_rows_than_an_address_space_holds_are_refused(m: int) -> None:
    packed = KERNELS[0].pack(random_weight(24, 64)).tensors["packed"]
    x, y = torch.zeros(1, 64), torch.zeros(1, 24)
    rows = (x.data_ptr(), 1 << 12, m, None, None, y.data_ptr())
    call = native_library.Product(packed.data_ptr(), packed.numel(), *rows, -1, 16, 0, KERNELS[0].isa, 1)
    assert native_library.load().tl_matmul(ctypes.byref(call)) == 3


# 2**21 rows of 1024 inputs need 2 GB of quantized activations; the limit leaves 256 MB. x is never touched.
LITTLE_MEMORY = """
import ctypes, resource, struct, sys

library = ctypes.CDLL(sys.argv[1])
n, k, m = 32, 1024, 1 << 21
geometry = struct.pack("<4q6i", n, k, 32, 1, 4, 0, 8, 0, 0, 0)
size = ctypes.c_int64()
assert library.tl_packed_bytes(geometry, ctypes.byref(size)) == 0
packed = ctypes.create_string_buffer(size.value)
assert library.tl_pack(geometry, bytes(n * k), bytes(n * k // 8), None, None, packed, size, 1) == 0
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
for threads in (1, 4):
    pointers = (ctypes.addressof(packed), size.value, 4096, k, m, 0, 0, 4096, -1)
    assert library.tl_matmul(struct.pack("<9q4i", *pointers, 8, 0, 0, threads)) == 5
print("told")
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the limit on memory is Linux's")
def test_missing_memory_is_a_status() -> None:
    command = [sys.executable, "-c", LITTLE_MEMORY, str(build_native.LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "told\n", "")
