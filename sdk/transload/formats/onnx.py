"""Quantized linears of ONNX models: MatMulNBits nodes, and MatMul or Gemm over a DequantizeLinear.

A GatherBlockQuantized node is an embedding with the same tensors, its codes as [N, bytes per row].

MatMulNBits (com.microsoft, opset 1), nblk = ceil(K / block_size), codes low first along K:

    B           uint8 [N, nblk, block_size*bits/8]   the last block of a row is padded
    scales      float [N, nblk], or flat             the dtype of the activations
    zero_points uint8 [N, ceil(nblk*bits/8)] packed low first, each row padded to a byte; or floats [N, nblk]; or absent
    g_idx       int32 [K]

DequantizeLinear keeps the weight of a MatMul as [K, N] (u)int4 or (u)int8, scales and zeros [nblk, N] for axis 0.
Source: onnxruntime 1.31 `docs/ContribOperators.md`, ONNX opset 21, checked by running onnxruntime in the tests.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import FormatError
from transload.formats import stored
from transload.formats.base import Entry, Format, Source, naming
from transload.formats.limits import integer_limits
from transload.formats.onnx_graph import Linear
from transload.formats.onnx_source import OnnxSource
from transload.headers import TensorInfo
from transload.headers.info import shown
from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec, Zero

BLOCKS = (16, 32, 64, 128, 256)  # what onnxruntime's CPU kernel takes


class Onnx(Format):
    """The quantized linears of an .onnx file."""

    name: ClassVar[str] = "onnx"
    container: ClassVar[str] = "onnx"
    embeddings: ClassVar[bool] = True

    def detects(self, source: Source) -> bool:
        """True for every ONNX model."""
        return isinstance(source, OnnxSource)

    def entries(self, source: Source) -> dict[str, Entry]:
        """A module for every quantized linear, named after its node; other initializers as they are stored."""
        found = _source(source)
        return stored.with_floats(source, [_entry(source, linear) for linear in found.linears.values()], found.tables)

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, scales and zero points."""
        linear = _source(source).linears[entry.name]
        with naming(source, entry):
            return _decode_nbits(source, linear, entry) if linear.nbits else _decode_dequantize(source, linear, entry)

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """4 or 8 bits in blocks that onnxruntime takes, any kind of zero point but an offset, float32 scales.

        Scales have the dtype of the activations, which is float32 here. MatMulNBits' accuracy level 4 is activations in
        int8 per token and block; per token alone is coarser, so that this serves it too.
        """
        zeros = (Zero.MIDPOINT, Zero.CODES, Zero.FLOATS)
        reason = integer_limits(spec, shape, (4, 8), zeros, (torch.float32,))
        if reason is None and spec.act not in (None, ActSpec(), ActSpec(group_size=spec.group_size)):
            return f"onnxruntime multiplies with floats or with int8 per token and block, not {spec.act}"
        if reason is None and spec.group_size not in BLOCKS:
            found = "one scale per row" if spec.group_size == PER_CHANNEL else f"groups of {spec.group_size}"
            return f"its blocks are of 16, 32, 64, 128 or 256 values, not {found}"
        return reason

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """The inputs of one MatMulNBits node."""
        b, size, blocks = w.spec.bits, w.spec.group_size, w.scales.shape[1]
        codes = torch.nn.functional.pad(w.codes, (0, blocks * size - w.k)).reshape(w.n, blocks, size)
        parts = {"B": bits.pack(codes, b), "scales": w.scales}
        if w.zeros is not None:
            parts["zero_points"] = bits.pack(w.zeros, b) if w.spec.zero is Zero.CODES else w.zeros
        if w.g_idx is not None:
            parts["g_idx"] = w.g_idx
        return {f"{name}.{part}": t for part, t in parts.items()}


def _source(source: Source) -> OnnxSource:
    assert isinstance(source, OnnxSource)
    return source


def _entry(source: Source, linear: Linear) -> Entry:
    scales = stored.nonempty(_need(source, linear.scales, stored.FLOATS, None))
    spec = _nbits_spec(source, linear, scales) if linear.nbits else _dequantize_spec(source, linear, scales)
    return stored.entry(source, linear.module, spec, (linear.n, linear.k), linear.tensors())


def _nbits_spec(source: Source, linear: Linear, scales: TensorInfo) -> QuantSpec:
    n, k, b, size = linear.n, linear.k, linear.bits, linear.block
    blocks = -(-k // size)
    why = f"for N={n}, K={k}, bits={b}, block_size={size}"
    _need(source, linear.codes, ("U8",), ((n, blocks, size * b // 8), (n, blocks * size * b // 8)), why)
    _need(source, scales.name, stored.FLOATS, ((n, blocks), (n * blocks,)), why)
    zero = Zero.MIDPOINT
    if linear.zeros:
        packed = bits.packed_len(blocks, b)
        info = _need(source, linear.zeros, ("U8", scales.dtype), None)
        wide = blocks if info.dtype != "U8" else packed
        _need(source, linear.zeros, ("U8", scales.dtype), ((n, wide), (n * wide,)), why)
        zero = Zero.CODES if info.dtype == "U8" else Zero.FLOATS
    if linear.g_idx:
        _need(source, linear.g_idx, ("I32",), ((k,),), why)
    dtype = stored.SCALE_DTYPES[scales.dtype]
    act = ActSpec(group_size=size) if linear.int8 else None
    return QuantSpec(b, size, zero=zero, scale_dtype=dtype, act=act, act_order=bool(linear.g_idx))


def _dequantize_spec(source: Source, linear: Linear, scales: TensorInfo) -> QuantSpec:
    n, k = linear.n, linear.k
    signed = source.infos[linear.codes].dtype.startswith("I")
    along_k = linear.axis == (1 if linear.transposed else 0)
    size = linear.block if linear.block and linear.block < k else PER_CHANNEL
    if linear.block and not along_k:
        raise FormatError(
            f"{source.path}: node {shown(linear.module)} has blocks along its outputs, which are not read"
        )
    if not linear.block and scales.shape not in ((), (1,)) and along_k:
        raise FormatError(f"{source.path}: node {shown(linear.module)} has a scale for every input, which is not read")
    blocks = 1 if size == PER_CHANNEL else -(-k // size)
    blocked = (n, blocks) if linear.transposed else (blocks, n)
    allowed = (blocked,) if linear.block else ((), (1,), (n,))
    why = f"for N={n}, K={k}, block_size={linear.block}"
    _need(source, scales.name, stored.FLOATS, allowed, why)
    if linear.zeros:
        _need(source, linear.zeros, (source.infos[linear.codes].dtype,), (scales.shape,), why)
    zero = Zero.CODES if linear.zeros or not signed else Zero.MIDPOINT
    return QuantSpec(linear.bits, size, zero=zero, scale_dtype=stored.SCALE_DTYPES[scales.dtype])


def _decode_nbits(source: Source, linear: Linear, entry: Entry) -> QTensor:
    assert entry.spec is not None
    (n, k), b, blocks = entry.shape, linear.bits, entry.spec.groups(entry.shape[1])
    codes = bits.unpack(source.read(linear.codes).reshape(n, -1), b, blocks * linear.block)[:, :k].contiguous()
    scales = source.read(linear.scales).reshape(n, blocks)
    zeros = source.read(linear.zeros).reshape(n, -1) if linear.zeros else None
    if zeros is not None and entry.spec.zero is Zero.CODES:
        zeros = bits.unpack(zeros, b, blocks)
    g_idx = source.read(linear.g_idx) if linear.g_idx else None
    return QTensor(entry.spec, codes, scales, zeros, g_idx=g_idx)


def _decode_dequantize(source: Source, linear: Linear, entry: Entry) -> QTensor:
    assert entry.spec is not None
    n, groups = entry.shape[0], entry.spec.groups(entry.shape[1])
    codes = _unsigned(source.read(linear.codes), linear.bits)
    scales = _sides(source.read(linear.scales), n, groups, linear.transposed)
    zeros = None
    if linear.zeros:
        zeros = _sides(_unsigned(source.read(linear.zeros), linear.bits), n, groups, linear.transposed)
    elif entry.spec.zero is Zero.CODES:
        zeros = torch.zeros_like(scales, dtype=torch.uint8)  # unsigned weights without a zero point have it at 0
    return QTensor(entry.spec, (codes if linear.transposed else codes.T).contiguous(), scales, zeros)


def _unsigned(values: Tensor, width: int) -> Tensor:
    """Signed values shifted by half their range, unsigned ones as they are."""
    if values.dtype != torch.int8:
        return values
    return (values.to(torch.int16) + (1 << (width - 1))).to(torch.uint8)


def _sides(t: Tensor, n: int, groups: int, transposed: bool) -> Tensor:
    """Scales or zeros as [N, G]: stored as one, one an output, or by block in the weight's own order."""
    if t.dim() == 2:
        return (t if transposed else t.T).contiguous()
    return t.reshape(-1, 1).expand(n, groups).contiguous()


def _need(
    source: Source,
    name: str,
    dtypes: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...] | None,
    why: str = "",
) -> TensorInfo:
    """The header of an initializer with one of several shapes."""
    info = source.infos.get(name)
    if info is not None and (shapes is None or info.shape in shapes):
        return stored.need(source, name, dtypes, info.shape, why)
    return stored.need(source, name, dtypes, shapes[0] if shapes else (), why)
