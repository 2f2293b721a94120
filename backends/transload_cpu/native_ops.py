"""The native products as torch operators, so that torch.compile keeps its graph whole around them.

In eager mode the kernels call `multiply` directly: an operator call costs about as much as a small product.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload_cpu.native_library import DTYPES, Product, check, load


def multiply(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    n: int,
    act_bits: int,
    act_group: int,
    isa: int,
) -> Tensor:
    """x [M, K] times a packed weight plus bias: [M, N] in x's dtype. No copy is made when rows of x are contiguous.

    bias: [N], or [E, N] with counts; any float dtype. counts: int64 [E], rows of each expert, or None. act_bits: 8
    for int8 activations with one scale per act_group features (-1: per token), 16 for 16-bit activations.
    """
    if x.stride(-1) != 1 or (x.shape[0] > 1 and x.stride(0) < x.shape[1]):
        x = x.contiguous()
    if bias is not None:
        bias = bias.detach().to(torch.float32).contiguous()
    if counts is not None:
        counts = counts.to(torch.int64).contiguous()
    y = x.new_empty(x.shape[0], n)
    call = Product(
        packed.data_ptr(),
        packed.numel(),
        x.data_ptr(),
        x.stride(0),
        x.shape[0],
        None if counts is None else counts.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        act_group,
        act_bits,
        DTYPES[x.dtype],
        isa,
        torch.get_num_threads(),
    )
    check(load().tl_matmul(ctypes.byref(call)), "matmul")
    return y


@torch.library.custom_op("transload_cpu::native_multiply", mutates_args=(), device_types="cpu")
def native_multiply(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    n: int,
    act_bits: int,
    act_group: int,
    isa: int,
) -> Tensor:
    """`multiply` as an operator."""
    return multiply(x, packed, bias, counts, n, act_bits, act_group, isa)


@native_multiply.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    counts: Tensor | None,
    n: int,
    act_bits: int,
    act_group: int,
    isa: int,
) -> Tensor:
    return x.new_empty(x.shape[0], n)


def float_product(x: Tensor, w: Tensor, isa: int) -> Tensor:
    """Rows x float32 [M, K] times float w [N, K]: float32 [M, N]. Raises ConfigError for other dtypes and shapes."""
    fits = w.dim() == x.dim() == 2 and x.shape[1] == w.shape[1] and x.dtype is torch.float32 and w.dtype in DTYPES
    if not fits or not x.is_contiguous() or not w.is_contiguous() or w.device.type != "cpu":
        found = f"{x.dtype} {tuple(x.shape)} and {w.dtype} {tuple(w.shape)} on {w.device}"
        raise ConfigError(
            f"native product: {found}, expected contiguous float32 [M, K] and floats [N, K] in host memory"
        )
    y = torch.empty(len(x), len(w))
    address, threads = w.data_ptr(), torch.get_num_threads()
    status = load().tl_float_product(
        address, DTYPES[w.dtype], *w.shape, x.data_ptr(), len(x), y.data_ptr(), isa, threads
    )
    check(status, "product")
    return y


@torch.library.custom_op("transload_cpu::native_float_product", mutates_args=(), device_types="cpu")
def native_float_product(x: Tensor, w: Tensor, isa: int) -> Tensor:
    """`float_product` as an operator."""
    return float_product(x, w, isa)


@native_float_product.register_fake
def _(x: Tensor, w: Tensor, isa: int) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[0])
