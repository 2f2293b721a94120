"""The truth: the shortest code that says what every kernel must compute. Slow on purpose.

W4A16 multiplies 16/32-bit activations with dequantized weights. W4A8 quantizes activations to int8, sums integer
products exactly inside each segment (the smaller of weight group and activation group), and only then scales.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transload.errors import ConfigError, Unsupported
from transload.quant import PER_CHANNEL, ActSpec, Grid, QTensor, QuantSpec, Zero


def dequantize(w: QTensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weight as floats [..., N, K]; see QTensor.dequantize."""
    return w.dequantize(dtype)


def quantize_rtn(weight: Tensor, spec: QuantSpec) -> QTensor:
    """Rounds a weight to the nearest code of each group (absmax or min/max range, no calibration).

    weight: float [..., N, K]. Symmetric integers use scale = absmax / (2**(bits-1) - 0.5), as compressed-tensors does;
    codebooks absmax / max(grid); the others (max - min) / (2**bits - 1) with zero inside the range.
    Raises ValueError when the weight is not finite.
    """
    if not bool(torch.isfinite(weight).all()):
        raise ValueError("the weight contains NaN or infinity")
    k, groups = weight.shape[-1], spec.groups(weight.shape[-1])
    size = k if spec.group_size == PER_CHANNEL else spec.group_size
    x = torch.nn.functional.pad(weight.float(), (0, groups * size - k)).reshape(*weight.shape[:-1], groups, size)
    if spec.zero in (Zero.MIDPOINT, Zero.NONE):
        return _rtn_symmetric(x, k, spec)
    return _rtn_asymmetric(x, k, spec)


def _rtn_symmetric(x: Tensor, k: int, spec: QuantSpec) -> QTensor:
    grid = spec.grid.values(spec.bits).to(x.device)
    reach = spec.midpoint - 0.5 if spec.grid is Grid.INT else float(grid[grid.isfinite()].max())
    scales = _stored(x.abs().amax(-1) / reach, spec.scale_dtype)
    ratio = x / scales.float().unsqueeze(-1)
    if spec.grid is Grid.INT:
        codes = (ratio.round() + spec.midpoint).clamp(0, 2 * spec.midpoint - 1).to(torch.uint8)
    elif spec.grid is Grid.E4M3:
        codes = ratio.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = (ratio.unsqueeze(-1) - grid).abs().argmin(-1).to(torch.uint8)
    return QTensor(spec, codes.flatten(-2)[..., :k].contiguous(), scales)


def _rtn_asymmetric(x: Tensor, k: int, spec: QuantSpec) -> QTensor:
    top = (1 << spec.bits) - 1
    low, high = x.amin(-1).clamp(max=0), x.amax(-1).clamp(min=0)
    scales = _stored((high - low) / top, spec.scale_dtype)
    s = scales.float()
    zeros = mins = None
    if spec.zero is Zero.CODES:
        zeros = (-low / s).round().clamp(0, top).to(torch.uint8)
        shift = zeros.float()
    elif spec.zero is Zero.FLOATS:
        zeros = (-low / s).to(spec.scale_dtype)
        shift = zeros.float()
    else:
        mins = low.to(spec.scale_dtype)
        shift = -mins.float() / s
    codes = (x / s.unsqueeze(-1) + shift.unsqueeze(-1)).round().clamp(0, top).to(torch.uint8)
    return QTensor(spec, codes.flatten(-2)[..., :k].contiguous(), scales, zeros, mins)


def _stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as they will be stored; zero and underflowing ones become the smallest normal number."""
    info = torch.finfo(dtype)
    return scales.clamp(info.tiny, info.max).to(dtype)


def quantize_activation(x: Tensor, act: ActSpec) -> tuple[Tensor, Tensor]:
    """Dynamic symmetric int8: x float [M, K] -> (int8 [M, K], float32 scales [M, A]), A groups of act.group_size.

    scale = absmax / 127, q = round_half_even(x / scale). An all-zero group gets scale 0 and codes 0.
    A row with NaN or infinity gets a NaN scale, so that it stays visible in the output and touches no other row.
    """
    m, k = x.shape
    size = k if act.group_size == PER_CHANNEL else act.group_size
    groups = -(-k // size) if k else 0
    blocks = torch.nn.functional.pad(x.float(), (0, groups * size - k)).reshape(m, groups, size)
    scales = blocks.abs().amax(-1) / 127 if k else blocks.new_zeros(m, 0)
    scales = torch.where(scales.isfinite(), scales, torch.nan)
    q = torch.where(scales.unsqueeze(-1) > 0, blocks / scales.unsqueeze(-1), 0).round().clamp(-127, 127)
    return q.reshape(m, groups * size)[:, :k].to(torch.int8), scales


def integer_sums(xq: Tensor, codes: Tensor, segment: int) -> Tensor:
    """Exact sums over segments of K: int8 [M, K] x uint8 [N, K] -> int64 [S, M, N], S = ceil(K / segment).

    Computed in float64, which is exact below 2**53: a product is at most 127 * 255.
    """
    starts = range(0, xq.shape[1], segment)
    parts = [xq[:, s : s + segment].double() @ codes[:, s : s + segment].double().T for s in starts]
    return torch.stack(parts).long() if parts else torch.zeros(0, len(xq), len(codes), dtype=torch.int64)


def matmul(x: Tensor, w: QTensor, bias: Tensor | None = None) -> Tensor:
    """y = x @ w.T + bias. x: float [M, K], w: [N, K], bias: [N] or None. Returns float32 [M, N]."""
    y = _matmul_a8(x, w, w.spec.act) if w.spec.act else x.float() @ w.dequantize().T
    return y if bias is None else y + bias.float()


def grouped_matmul(x: Tensor, w: QTensor, counts: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows sorted by expert, each multiplied with its own expert's weight.

    x: float [M, K]; w: [E, N, K]; counts: int64 [E], rows of each expert, sum M, zeros allowed; bias: [E, N] or None.
    Returns float32 [M, N]. Raises ConfigError when counts do not fit x and w.
    """
    parts = [
        matmul(rows, w.expert(e), None if bias is None else bias[e])
        for e, rows in enumerate(torch.split(x, rows_of_experts(counts, len(x), w.experts)))
    ]
    return torch.cat(parts)


def rows_of_experts(counts: Tensor, m: int, experts: int | None) -> list[int]:
    """counts as a list, checked: one number an expert, none negative, together the M rows of x. Raises ConfigError."""
    rows: list[int] = counts.tolist()
    if len(rows) != experts or min(rows, default=0) < 0 or sum(rows) != m:
        raise ConfigError(f"counts {rows} for {experts} experts and {m} rows: give one an expert, together {m}")
    return rows


def _matmul_a8(x: Tensor, w: QTensor, act: ActSpec) -> Tensor:
    if act.static:
        raise Unsupported("the reference matmul quantizes activations dynamically; static scales belong to the engine")
    segment = _segment(w, act)
    order = None if w.g_idx is None else torch.argsort(w.g_idx, stable=True)
    xq, sx = quantize_activation(x, act)
    codes = w.codes
    if order is not None:
        xq, codes = xq[:, order], codes[:, order]
    starts = range(0, w.k, segment)
    group_of = w.group_of_k() if order is None else w.group_of_k()[order]
    dot = integer_sums(xq, codes, segment) if w.spec.grid is Grid.INT else _grid_sums(xq, w, codes, segment)
    row_sums = integer_sums(xq, torch.ones_like(codes[:1]), segment)[..., 0]
    zeros, y = w.zero_points(torch.float64), torch.zeros(len(x), w.n, dtype=torch.float64)
    for i, start in enumerate(starts):
        g = int(group_of[start])
        a = sx[:, 0 if act.group_size == PER_CHANNEL else start // act.group_size].double()
        part = dot[i].double()
        if zeros is not None:
            part = part - row_sums[i].double()[:, None] * zeros[:, g]
        part = part * w.scales[:, g].double()
        if w.mins is not None:
            part = part + row_sums[i].double()[:, None] * w.mins[:, g].double()
        y += part * a[:, None]
    return y.float()


def _segment(w: QTensor, act: ActSpec) -> int:
    """Length of the runs of K inside which both scales are constant."""
    wg = w.k if w.spec.group_size == PER_CHANNEL else w.spec.group_size
    ag = w.k if act.group_size == PER_CHANNEL else act.group_size
    small, large = min(wg, ag), max(wg, ag)
    if large % small and large < w.k:
        raise Unsupported(f"activation groups of {ag} and weight groups of {wg}: one must divide the other")
    if w.g_idx is not None:
        if act.group_size != PER_CHANNEL:
            raise Unsupported("act-order weights with activation scales per group: use scales per token")
        if not torch.equal(torch.bincount(w.g_idx, minlength=w.spec.groups(w.k)), _group_sizes(w.k, wg)):
            raise Unsupported("act-order with groups of unequal sizes")
    return max(small, 1)


def _group_sizes(k: int, size: int) -> Tensor:
    return torch.bincount(torch.arange(k) // max(size, 1))


def _grid_sums(xq: Tensor, w: QTensor, codes: Tensor, segment: int) -> Tensor:
    values = w.spec.grid.values(w.spec.bits).double()[codes.long()]
    starts = range(0, w.k, segment)
    return torch.stack([xq[:, s : s + segment].double() @ values[:, s : s + segment].T for s in starts])
