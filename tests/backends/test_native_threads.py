"""Threads of the native CPU library: the same bits with any number, from many callers, after forks, and at exit."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from transload import reference
from transload.quant import ActSpec, QTensor, QuantSpec
from transload_cpu import build_native, native_layout, native_library
from transload_cpu.native_kernel import NATIVE_KERNELS, NativePortable

if native_library.unavailable():
    pytest.skip(str(native_library.unavailable()), allow_module_level=True)

ISA = next(k.isa for k in (*NATIVE_KERNELS, NativePortable()) if native_library.supported(k.isa))
N, K = 1500, 256  # enough weight for more than one thread
W4A8, W4A16 = ActSpec(8, 32), None


def packed_weight(act: ActSpec | None) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    spec = QuantSpec(4, 32, scale_dtype=torch.float16, act=act)
    w: QTensor = reference.quantize_rtn(torch.randn(N, K, generator=random), spec)
    return native_layout.pack("test", w).tensors["packed"]


def product(packed: torch.Tensor, x: torch.Tensor, act: ActSpec | None, threads: int) -> torch.Tensor:
    y = x.new_full((x.shape[0], N), torch.nan)
    bits, group = (16, -1) if act is None else (8, act.group_size)
    rows = (x.data_ptr(), x.stride(0), x.shape[0], None, None, y.data_ptr())
    dtype = native_library.DTYPES[x.dtype]
    call = native_library.Product(packed.data_ptr(), packed.numel(), *rows, group, bits, dtype, ISA, threads)
    assert native_library.load().tl_matmul(ctypes.byref(call)) == 0
    return y


def rows(m: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(m)).to(dtype)


@pytest.mark.parametrize("act", [W4A8, W4A16], ids=["W4A8", "W4A16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_any_number_of_threads_gives_the_bits_of_one(act: ActSpec | None, dtype: torch.dtype) -> None:
    packed = packed_weight(act)
    for m in (1, 2, 13, 100, 700):
        x = rows(m, dtype)
        alone = product(packed, x, act, 1)
        for threads in range(2, 9):
            assert torch.equal(product(packed, x, act, threads), alone), f"{m} rows, {threads} threads"


def test_many_callers_share_the_workers() -> None:
    """Eight callers at once, each asking for up to eight threads: there are never enough workers for all."""
    packed = packed_weight(W4A8)
    inputs = [rows(m) for m in (1, 2, 7, 30, 64, 150)]
    alone = [product(packed, x, W4A8, 1) for x in inputs]

    def call(i: int) -> bool:
        return torch.equal(product(packed, inputs[i % 6], W4A8, 1 + i % 8), alone[i % 6])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(400)))


def digests() -> list[str]:
    packed = packed_weight(W4A8)
    return [hashlib.sha256(product(packed, rows(m), W4A8, 3).numpy().tobytes()).hexdigest() for m in (1, 50)]


def child(answer: multiprocessing.SimpleQueue[list[str]]) -> None:
    torch.set_num_threads(1)  # OpenMP's threads, unlike ours, do not survive a fork: torch would wait for them forever
    answer.put(digests())


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_child_process_has_workers_of_its_own(method: str) -> None:
    """Forked while other threads of the parent are inside products, and started afresh."""
    packed = packed_weight(W4A8)
    expected = digests()
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    stop = False

    def disturb() -> None:
        x = rows(64)
        while not stop:
            product(packed, x, W4A8, 3)

    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(disturb)
        try:
            process = context.Process(target=child, args=(queue,))  # type: ignore[attr-defined]
            process.start()
            process.join(120)
            assert process.exitcode == 0
            assert queue.get() == expected
        finally:
            stop = True
        busy.result()


# Without torch, so that every thread of the process is known. tl_geometry is 4 numbers of 8 bytes and 6 of 4.
LIFE_OF_A_POOL = """
import ctypes, os, struct, sys, threading, time

library = ctypes.CDLL(sys.argv[1])
geometry = struct.pack("<4q6i", 512, 256, 32, 1, 4, 0, 8, 0, 0, 0)
size = ctypes.c_int64()
assert library.tl_packed_bytes(geometry, ctypes.byref(size)) == 0
codes, scales = bytes(512 * 256), bytes(512 * 8 * 4)

def pack(threads):
    packed = ctypes.create_string_buffer(size.value)
    assert library.tl_pack(geometry, codes, scales, None, None, packed, size, threads) == 0

def tasks():
    return os.listdir("/proc/self/task")

def state(task):
    with open(f"/proc/self/task/{task}/stat") as file:
        return file.read().rsplit(")", 1)[1].split()[0]

pack(1)
assert len(tasks()) == 1, "one thread needs no workers"
pack(3)
assert len(tasks()) == 3, "three threads are the caller and two workers"
pack(2)
assert len(tasks()) == 3, "workers are kept"

workers = [task for task in tasks() if int(task) != os.getpid()]
deadline = time.monotonic() + 60
while any(state(task) != "S" for task in workers):
    assert time.monotonic() < deadline, "workers without work sleep"
    time.sleep(0.01)

child = os.fork()
if child == 0:
    first = len(tasks())
    pack(2)
    os._exit(0 if (first, len(tasks())) == (1, 2) else 1)
assert os.waitpid(child, 0)[1] == 0, "a forked child starts without workers and gets its own"

def forever():
    while True:
        pack(3)

for _ in range(3):
    threading.Thread(target=forever, daemon=True).start()
time.sleep(0.05)
print("the process ends while calls are running")
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_workers_come_sleep_and_go() -> None:
    command = [sys.executable, "-c", LIFE_OF_A_POOL, str(build_native.LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "ends while calls are running" in done.stdout
