"""Every kernel compiles for every architecture without a GPU: Triton's own compiler down to machine code.

The configurations are those that `configs` gives on an A100, H100/H200 and B200 for few, some and many rows.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from transload.quant import ActSpec, QuantSpec, Zero
from transload_cuda import configs
from transload_cuda.configs import Ask
from transload_cuda.layouts import geometry, zero_kind

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed; it compiles the kernels")

ARCHS = (80, 90, 100)
X_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INTS = ("m", "n", "k", "width", "groups", "experts", "tiles_m", "tiles_n", "x_stride", "padded_k", "size")
# What launch.py passes as multiples of 16 for real models; Triton specializes a kernel for that.
ALIGNED = {"n", "k", "width", "x_stride", "padded_k"}


@dataclass(frozen=True)
class Build:
    """One kernel to compile: a weight, the dtype of x in Triton's words, rows, experts."""

    spec: QuantSpec
    x: str
    rows: int
    arch: int
    experts: int = 0
    k: int = 4096

    @property
    def id(self) -> str:
        act = f"a8g{self.spec.act.group_size}" if self.spec.act else "a16"
        zero = self.spec.zero.value
        return (
            f"sm{self.arch}-w{self.spec.bits}{act}-g{self.spec.group_size}-{zero}-{self.x}-m{self.rows}-e{self.experts}"
        )


SYM = QuantSpec(4, 128)
TOKEN, GROUP = ActSpec(), ActSpec(group_size=128)


def _builds() -> Iterator[Build]:
    for arch in ARCHS:
        for rows in (1, 64, 512):
            yield Build(SYM, "bf16", rows, arch)
            yield Build(replace(SYM, act=TOKEN), "bf16", rows, arch)
        yield Build(SYM, "bf16", 256, arch, experts=128)
        yield Build(replace(SYM, act=GROUP), "bf16", 256, arch, experts=128)
        yield Build(QuantSpec(4, 32, zero=Zero.CODES), "fp16", 16, arch)
        yield Build(QuantSpec(4, 32, zero=Zero.MINS, act=ActSpec(group_size=32)), "bf16", 16, arch)
        yield Build(QuantSpec(8, -1, act=TOKEN), "bf16", 512, arch)
    yield Build(QuantSpec(4, 16, zero=Zero.FLOATS), "fp32", 1, 90)
    yield Build(QuantSpec(8, 64, zero=Zero.CODES), "bf16", 64, 90)
    yield Build(QuantSpec(6, -1, zero=Zero.CODES), "fp32", 512, 80)


BUILDS = tuple(_builds())


def compiled(fn: Any, pointers: dict[str, str], constants: dict[str, Any], arch: int, warps: int, stages: int) -> Any:
    """A kernel as launch.py would have it compiled: pointers and model sizes are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = fn.arg_names
    kinds = {name: pointers.get(name, "i32" if name in INTS else "constexpr") for name in names}
    assert {name for name in names if kinds[name] == "constexpr"} == set(constants)
    aligned = [name for name in names if kinds[name].startswith("*") or name in ALIGNED]
    source = ASTSource(
        fn=fn,
        signature=kinds,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": warps, "num_stages": stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def matmul(build: Build) -> tuple[Any, configs.Config]:
    from transload_cuda.jit import launch
    from transload_cuda.jit.a8 import matmul_a8
    from transload_cuda.jit.a16 import matmul_a16

    spec = build.spec
    g = geometry(build.k, spec)
    scheme, size = ("a8", 1) if spec.act else ("a16", 4 if build.x == "fp32" else 2)
    rows = build.rows if not build.experts else max(1, build.rows // build.experts)
    ask = Ask(
        scheme, rows, 4096, g.width, g.lanes, g.segment, size, build.arch, 132, build.rows if build.experts else None
    )
    config = configs.fitted(configs.default(ask), ask)
    apart = launch.subtracts_apart(build.arch, config)
    constants: dict[str, Any] = {
        "LANES": g.lanes,
        "GROUP": g.group,
        "ZERO": zero_kind(spec),
        "OFFSET": spec.midpoint,
        "EXPERTS": build.experts,
        "HAS_BIAS": True,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLITS": config.splits,
        "BAND": 8,
        "PTX": launch.ptx(spec, X_DTYPES[build.x], apart),
    }
    y = f"*{build.x}" if config.splits == 1 else "*fp32"
    sides = "*u8" if spec.zero is Zero.CODES else "*fp32"
    pointers = {"codes_ptr": "*u8", "scales_ptr": "*fp32", "sides_ptr": sides, "bias_ptr": f"*{build.x}"}
    pointers |= {"counts_ptr": "*i64", "y_ptr": y}
    if spec.act is None:
        pointers["x_ptr"] = f"*{build.x}"
        constants |= {"EVEN_K": True, "APART": apart}
        return compiled(matmul_a16, pointers, constants, build.arch, config.warps, config.stages), config
    pointers |= {"x_ptr": "*i8", "x_scales_ptr": "*fp32", "sums_ptr": "*i32"}
    constants |= {"BITS": spec.bits, "ACT_GROUP": g.act_group, "WHOLE": g.segment == 0}
    return compiled(matmul_a8, pointers, constants, build.arch, config.warps, config.stages), config


def cuobjdump(cubin: bytes, folder: Path, option: str) -> str:
    """What Triton's own copy of NVIDIA's tool says of a kernel's machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton ships no cuobjdump")
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def registers_and_stack(cubin: bytes, folder: Path) -> tuple[int, int]:
    """Registers a thread and bytes of stack (spills) of a kernel."""
    text = cuobjdump(cubin, folder, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


def longest_loop(cubin: bytes, folder: Path) -> int:
    """Instructions in the longest loop of a kernel: between a branch backwards and its target."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", cuobjdump(cubin, folder, "-sass"))
    places = [int(place, 16) for place, _ in lines]
    jumps = [re.search(r"\bBRA\S* .*?0x([0-9a-f]+)", text) for _, text in lines]
    backward = [(int(j[1], 16), at) for j, at in zip(jumps, places, strict=True) if j and int(j[1], 16) < at]
    return max(sum(first <= at <= last for at in places) for first, last in backward)


@pytest.mark.parametrize("build", BUILDS, ids=lambda b: b.id)
def test_a_matmul_compiles_to_tensor_core_code_that_fits(build: Build, tmp_path: Path) -> None:
    kernel, config = matmul(build)
    assert f".target sm_{build.arch}" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= configs.SHARED_BYTES[build.arch], config
    newest = ("mma.sync", "wgmma.mma_async", "tcgen05.mma")[ARCHS.index(build.arch)]
    assert (newest if config.warps >= 4 and not build.spec.act else "mma") in kernel.asm["ptx"]
    registers, stack = registers_and_stack(kernel.asm["cubin"], tmp_path)
    print(f"{build.id}: {registers} registers, {stack} bytes of stack, {kernel.metadata.shared} shared, {config}")
    assert stack <= (STACK_ALLOWED if build.spec.act and config.block_m == 128 else 0)


# Bytes a thread may spill in the large tiles of W4A8; the others spill nothing.
STACK_ALLOWED = 192


@pytest.mark.parametrize("arch", ARCHS)
def test_the_quantizers_and_the_sum_of_splits_compile(arch: int) -> None:
    from transload_cuda.jit.quantize import quantize_groups, quantize_tokens
    from transload_cuda.jit.tiles import sum_splits

    pointers = {"x_ptr": "*bf16", "order_ptr": "*i32", "q_ptr": "*i8", "scales_ptr": "*fp32", "sums_ptr": "*i32"}
    token = {"BLOCK": 128, "MANY": 32, "HAS_ORDER": True, "ONE_SUM": True, "SWIGLU": False}
    group = {"GROUP": 128, "BLOCK": 64, "BLOCKS": 2, "MANY": 16, "SWIGLU": True}
    for kernel in (
        compiled(quantize_tokens, pointers, token, arch, 8, 3),
        compiled(quantize_groups, {n: p for n, p in pointers.items() if n != "order_ptr"}, group, arch, 4, 3),
        compiled(sum_splits, {"partial_ptr": "*fp32", "y_ptr": "*bf16"}, {"SPLITS": 4, "BLOCK": 1024}, arch, 4, 3),
    ):
        assert f".target sm_{arch}" in kernel.asm["ptx"]
        assert len(kernel.asm["cubin"]) > 1000


# Instructions a weight and thread in the loop of a product of few rows, of which 4.9 to 6.7 (a16) and 5.1 to 5.5 (a8)
# were needed without PTX. An H200 issues 29.7e12 a second: at 2.4, codes and scales come in at 6.4 TB/s, more than its
# memory gives.
MOST = {"a16": 2.4, "a8": 1.15}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("spec", [SYM, replace(SYM, act=TOKEN), replace(SYM, zero=Zero.CODES)], ids=str)
def test_few_rows_take_few_instructions_a_weight(spec: QuantSpec, arch: int, tmp_path: Path) -> None:
    kernel, config = matmul(Build(spec, "bf16", 1, arch))
    weights = 2 * config.block_n * config.block_k / (32 * config.warps)
    each = longest_loop(kernel.asm["cubin"], tmp_path) / weights
    print(f"sm_{arch} {spec}: {each:.2f} instructions a weight, {config}")
    assert each <= MOST["a8" if spec.act else "a16"]
