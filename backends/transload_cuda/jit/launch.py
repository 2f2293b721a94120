"""Starts the Triton kernels on a packed weight. Nothing here waits for the device or reads a value from it.

Importing this module imports Triton. With TRITON_INTERPRET=1 set before that, the kernels run on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.interpreter import InterpretedFunction

from transload.quant import QuantSpec, Zero
from transload_cuda import configs, layouts
from transload_cuda.configs import Ask, Config
from transload_cuda.jit.a8 import matmul_a8
from transload_cuda.jit.a16 import matmul_a16
from transload_cuda.jit.quantize import quantize_groups, quantize_tokens
from transload_cuda.jit.tiles import sum_splits
from transload_cuda.jit.unpack import floats_ptx, int8_ptx

__all__ = ["INTERPRETED", "OutOfResources", "ask", "find_config", "multiply", "ptx", "quantize"]

INTERPRETED = isinstance(matmul_a16, InterpretedFunction)
BAND = 8  # tiles of rows that walk through the outputs together
WHOLE_BLOCK = 128  # inputs that the quantizer takes at a time where a row has no groups


def multiply(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    spec: QuantSpec,
    n: int,
    bias: Tensor | None = None,
    counts: Tensor | None = None,
    config: Config | None = None,
    swiglu: bool = False,
) -> Tensor:
    """x [M, K] times a weight packed by `layouts.pack`, plus bias: [M, N] in x's dtype.

    counts: int64 [E] on x's device, rows of each expert, or None. Rows of x beyond their sum give zeros. The caller has
    checked the operands. config: for tuning; by default `configs.find` decides. swiglu, for int8 activations only: x is
    the first half of rows [2 K], and silu(x) times the second half is what is quantized and multiplied.
    """
    # Triton launches on the current GPU, wherever the operands are.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        return _multiply(x, tensors, spec, n, bias, counts, config, swiglu)


def _multiply(
    x: Tensor,
    tensors: Mapping[str, Tensor],
    spec: QuantSpec,
    n: int,
    bias: Tensor | None,
    counts: Tensor | None,
    config: Config | None,
    swiglu: bool,
) -> Tensor:
    m, k = x.shape
    if m == 0:
        return x.new_empty(0, n)
    if INTERPRETED and x.dtype == torch.bfloat16:
        # The interpreter computes with bfloat16's bits as if they were integers; float32 holds the same values.
        wide = None if bias is None else bias.float()
        floats = x.as_strided((m, 2 * k), x.stride()).float()[:, :k] if swiglu else x.float()
        return multiply(floats, tensors, spec, n, wide, counts, config, swiglu).to(x.dtype)
    if x.stride(1) != 1:
        x = x.contiguous()
    g = layouts.geometry(k, spec)
    config = config or find_config(x, spec, n, counts)
    tiles_m = _row_tiles(m, config.block_m, 0 if counts is None else len(counts))
    tiles_n = -(-n // config.block_n)
    splits = config.splits
    # Split sums, and rows that belong to no expert, are read or returned though no program writes them.
    make = torch.empty if counts is None else torch.zeros
    y = make(m, n, dtype=x.dtype, device=x.device)
    out = y if splits == 1 else make(splits, m, n, dtype=torch.float32, device=x.device)
    sides = next((tensors[name] for name in ("zeros", "mins") if name in tensors), tensors["scales"])
    weight = (tensors["codes"], tensors["scales"], sides, out if bias is None else bias)
    sizes = (g.width, g.groups, 1 if counts is None else len(counts), tiles_m, tiles_n)
    apart = subtracts_apart(_chip(x.device)[0], config)
    choices = {
        "LANES": g.lanes,
        "GROUP": g.group,
        "ZERO": layouts.zero_kind(spec),
        "OFFSET": spec.midpoint,
        "EXPERTS": 0 if counts is None else triton.next_power_of_2(len(counts)),
        "HAS_BIAS": bias is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLITS": splits,
        "BAND": BAND,
        "PTX": "" if INTERPRETED else ptx(spec, x.dtype, apart),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    grid = (tiles_m * tiles_n, splits)
    rows = out if counts is None else counts
    order = tensors.get("order")
    if spec.act is None:
        if order is not None:
            x = x.index_select(1, order)
        even = g.padded_k == k
        matmul_a16[grid](x, *weight, rows, out, m, n, k, *sizes, x.stride(0), EVEN_K=even, APART=apart, **choices)
    else:
        q, scales, sums = quantize(x, g, config.block_k, order, swiglu)
        whole = g.segment == 0
        matmul_a8[grid](
            q, scales, sums, *weight, rows, out, m, n, *sizes,
            BITS=spec.bits, ACT_GROUP=g.act_group, WHOLE=whole, **choices,
        )  # fmt: skip
    if splits > 1:
        block = 1024
        sum_splits[(triton.cdiv(m * n, block),)](out, y, m * n, SPLITS=splits, BLOCK=block)
    return y


def quantize(
    x: Tensor, g: layouts.Geometry, block: int, order: Tensor | None, swiglu: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K] as int8 [M, padded_k], float32 scales [A, M] and int32 sums [blocks, M] (one sum without groups).

    swiglu: as in `multiply`.
    """
    m, k = x.shape
    q = torch.empty(m, g.padded_k, dtype=torch.int8, device=x.device)
    block = block if g.segment else WHOLE_BLOCK
    sums = torch.empty(g.padded_k // block if g.segment else 1, m, dtype=torch.int32, device=x.device)
    scales = torch.empty(g.padded_k // (g.act_group or g.padded_k), m, dtype=torch.float32, device=x.device)
    sizes = (m, k, g.padded_k, x.stride(0))
    if g.act_group == 0:
        many = min(4096 // block, triton.next_power_of_2(g.padded_k // block))
        quantize_tokens[(m,)](
            x, q if order is None else order, q, scales, sums, *sizes,
            BLOCK=block, MANY=many, HAS_ORDER=order is not None, ONE_SUM=g.segment == 0, SWIGLU=swiglu, num_warps=8,
        )  # fmt: skip
    else:
        blocks = triton.next_power_of_2(g.act_group // block)
        many = max(1, min(2048 // (blocks * block), triton.next_power_of_2(len(scales))))
        quantize_groups[(m, triton.cdiv(len(scales), many))](
            x, q, scales, sums, *sizes, GROUP=g.act_group, BLOCK=block, BLOCKS=blocks, MANY=many, SWIGLU=swiglu,
        )  # fmt: skip
    return q, scales, sums


@cache
def ptx(spec: QuantSpec, x_dtype: torch.dtype, apart: bool) -> str:
    """The PTX that unpacks codes of at most 4 bits for a tensor core; "" for wider codes and for float32 x."""
    if spec.bits > 4 or (spec.act is None and x_dtype == torch.float32):
        return ""
    if spec.act is not None:
        return int8_ptx(spec.bits)
    return floats_ptx(x_dtype == torch.float16, 0 if apart or spec.zero is Zero.CODES else spec.midpoint)


def subtracts_apart(arch: int, config: Config) -> bool:
    """True where W4A16 is faster with the midpoint's subtraction outside the PTX: for warp groups on Hopper.

    The subtraction keeps Triton from unpacking in the layout of a warp group's operand, for which codes would be read
    two at a time. Other tensor-core instructions read four, and there the PTX does it all.
    """
    return arch == 90 and config.warps % 4 == 0 and config.block_n >= 64


def find_config(x: Tensor, spec: QuantSpec, n: int, counts: Tensor | None) -> Config:
    """The configuration of a product; from shapes alone."""
    return configs.find(ask(x, spec, n, counts), _name(x.device))


def ask(x: Tensor, spec: QuantSpec, n: int, counts: Tensor | None) -> Ask:
    """What the configuration of a product depends on."""
    m, k = x.shape
    g = layouts.geometry(k, spec)
    experts = 0 if counts is None else len(counts)
    rows = m if not experts else -(-m // max(1, min(experts, m)))
    arch, multiprocessors = _chip(x.device)
    tiles = _row_tiles(m, 16, experts) if experts else None
    scheme, size = ("a16", x.element_size()) if spec.act is None else ("a8", 1)
    return Ask(scheme, rows, n, g.width, g.lanes, g.segment, size, arch, multiprocessors, tiles)


def _row_tiles(m: int, block: int, experts: int) -> int:
    """Tiles of rows to start: exact for a plain linear, the most that any counts can need for experts."""
    return -(-m // block) if not experts else min(m, m // block + min(experts, m))


@cache
def _chip(device: torch.device) -> tuple[int, int]:
    """(compute capability times ten, multiprocessors); the interpreter stands in for a small Hopper."""
    if device.type != "cuda":
        return 90, 8
    facts = torch.cuda.get_device_properties(device)
    return facts.major * 10 + facts.minor, facts.multi_processor_count


@cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "Triton interpreter"
