"""The arithmetic of the operators, as documented, on CPU tensors that hold exactly the bytes a device would be given.

Sources: op-plugin 517f2e7d, the operators' pages and the golden functions of test/test_custom_ops. Where a document
says how a device rounds or accumulates, so does this file; what no document says (the order of sums in a matmul) it
does in float32 or exactly. Importing this module registers everything; torch_npu must have been imported before.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from simulator import storage
from simulator.meta import simulates

_DTYPES = {1: torch.int8, 3: torch.int32, 5: torch.float16, 15: torch.bfloat16}  # c10::ScalarType
GARBAGE = -86  # what an operator leaves where its result is undefined: nothing may depend on it


@simulates("npu_dynamic_quant")
def dynamic_quant(
    x: Tensor, smooth_scales=None, group_index=None, dst_type=None, quant_mode="pertoken", dst_type_max=0.0
):
    assert smooth_scales is None
    assert group_index is None
    assert dst_type in (None, 1)
    assert quant_mode == "pertoken"
    scale = x.float().abs().amax(-1) / 127
    q = torch.round(x.float() / scale.unsqueeze(-1))  # half to even
    return torch.where(q.isfinite(), q, GARBAGE).to(torch.int8), scale


@simulates("npu_weight_quant_batchmatmul")
def weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset=None,
    quant_scale=None,
    quant_offset=None,
    bias=None,
    antiquant_group_size=0,
    inner_precise=0,
    weight_dtype=None,
):
    values = storage.read_int4(weight)
    scale, offset = (_per_k(t, values.shape[0], antiquant_group_size) for t in (antiquant_scale, antiquant_offset))
    y = x.float() @ _antiquant(values, scale, offset, x.dtype).float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


@simulates("npu_quant_matmul")
def quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    offset=None,
    pertoken_scale=None,
    bias=None,
    output_dtype=None,
    x1_dtype=None,
    x2_dtype=None,
    pertoken_scale_dtype=None,
    scale_dtype=None,
    group_sizes=None,
    y_scale=None,
):
    dtype = _DTYPES[1 if output_dtype is None else output_dtype]
    if x2.dtype == torch.int32:
        assert bias is None
        assert list(group_sizes) == [0, 0, 256]
        sums = _a8w4(x1, storage.read_int4(x2), _fp19(scale)) + offset.float()
        return (sums * pertoken_scale.float()).to(dtype)
    sums = _exact(x1, storage.read_int8(x2))
    if bias is not None and bias.dtype == torch.int32:
        sums = sums + bias.long()
    y = sums.float() * scale.float() * pertoken_scale.float().unsqueeze(-1)
    return (y if bias is None or bias.dtype == torch.int32 else y + bias.float()).to(dtype)


@simulates("npu_grouped_matmul")
def grouped_matmul(
    x,
    weight,
    bias=None,
    scale=None,
    offset=None,
    antiquant_scale=None,
    antiquant_offset=None,
    per_token_scale=None,
    group_list=None,
    activation_input=None,
    activation_quant_scale=None,
    activation_quant_offset=None,
    split_item=0,
    group_type=None,
    group_list_type=0,
    act_type=0,
    tuning_config=None,
    output_dtype=None,
    x_dtype=None,
    weight_dtype=None,
    scale_dtype=None,
    per_token_scale_dtype=None,
):
    (rows,), (stacked,) = x, weight
    assert split_item in (2, 3)
    assert group_type == 0
    dtype = rows.dtype if output_dtype is None else _DTYPES[output_dtype]
    four_bit = stacked.dtype == torch.int32
    values = storage.read_int4(stacked) if four_bit else storage.read_int8(stacked)
    y = torch.full((rows.shape[0], values.shape[-1]), GARBAGE, dtype=torch.float32)
    whole = torch.full(y.shape, GARBAGE, dtype=torch.int32)  # float32 does not hold every sum
    for e, part in _experts(group_list, group_list_type, rows.shape[0]):
        if antiquant_scale is not None:
            groups = antiquant_scale[0][e].reshape(-1, values.shape[-1])
            offsets = antiquant_offset[0][e].reshape(-1, values.shape[-1])
            length = values.shape[1] // groups.shape[0]
            s, o = (_per_k(t, values.shape[1], length) for t in (groups, offsets))
            y[part] = rows[part].float() @ _antiquant(values[e], s, o, rows.dtype).float()
        elif four_bit:
            sums = _a8w4(rows[part], values[e], _bits(scale[0][e])) + bias[0][e].float()
            y[part] = sums * per_token_scale[0][part].float().unsqueeze(-1)
        elif scale is None:
            sums = _exact(rows[part], values[e])
            assert dtype == torch.int32
            whole[part] = sums.int()
        else:
            sums = _exact(rows[part], values[e]).float() * scale[0][e].float()
            y[part] = sums * per_token_scale[0][part].float().unsqueeze(-1)
    if rows.dtype == torch.int8 and four_bit:
        rows.fill_(GARBAGE)  # the int8 x int4 operator works in place (test_npu_grouped_matmul.py)
    return [whole if dtype == torch.int32 else y.to(dtype)]


@simulates("npu_grouped_matmul_swiglu_quant_v2")
def grouped_matmul_swiglu_quant_v2(
    x: Tensor,
    weight,
    weight_scale,
    x_scale: Tensor,
    group_list: Tensor,
    smooth_scale=None,
    weight_assist_matrix=None,
    bias=None,
    dequant_mode=0,
    dequant_dtype=0,
    quant_mode=0,
    quant_dtype=0,
    group_list_type=0,
    tuning_config=None,
    x_dtype=None,
    weight_dtype=None,
    weight_scale_dtype=None,
    x_scale_dtype=None,
):
    values = storage.read_int4(weight[0])
    assert dequant_mode == (1 if weight_scale[0].dim() == 3 else 0)
    q = torch.full((x.shape[0], values.shape[-1] // 2), GARBAGE, dtype=torch.int8)
    scales = torch.full((x.shape[0],), float("nan"))
    for e, part in _experts(group_list, group_list_type, x.shape[0]):
        scale = _bits(weight_scale[0][e].reshape(-1, values.shape[-1]))
        gate_up = (_a8w4(x[part], values[e], scale) + weight_assist_matrix[0][e]) * x_scale[part].unsqueeze(-1)
        q[part], scales[part] = _swiglu_quant(gate_up)
    return q, scales


@simulates("npu_dequant_swiglu_quant")
def dequant_swiglu_quant(
    x: Tensor,
    weight_scale=None,
    activation_scale=None,
    bias=None,
    quant_scale=None,
    quant_offset=None,
    group_index=None,
    activate_left=False,
    quant_mode=0,
    dst_type=None,
    round_mode=None,
    activate_dim=None,
    swiglu_mode=0,
    clamp_limit=7.0,
    glu_alpha=1.702,
    glu_bias=1.0,
):
    assert activate_left
    assert quant_mode == 1
    q = torch.full((x.shape[0], x.shape[1] // 2), GARBAGE, dtype=torch.int8)
    scales = torch.full((x.shape[0],), float("nan"))
    for e, part in _experts(group_index, 1, x.shape[0]):
        q[part], scales[part] = _swiglu_quant(x[part].float() * weight_scale[e] * activation_scale[part])
    return q, scales


@simulates("npu_trans_quant_param")
def trans_quant_param(scale: Tensor, offset=None, round_mode=0):
    assert offset is None
    assert round_mode == 0
    low = scale.numpy().view(np.uint32) & np.uint32(0xFFFFE000)
    return torch.from_numpy(low.astype(np.int64) | np.int64(1 << 46))


@simulates("npu_convert_weight_to_int4pack")
def convert_weight_to_int4pack(weight: Tensor, inner_k_tiles=0):
    lanes = (weight.numpy().astype(np.int64) & 0xF).reshape(*weight.shape[:-1], -1, 8)
    words = (lanes << (4 * np.arange(8))).sum(-1).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32))


@simulates("npu_format_cast")
def format_cast(x: Tensor, acl_format, customize_dtype=None, input_dtype=None):
    assert acl_format in (storage.ND, storage.FRACTAL_NZ)
    return storage.cast_to_nz(x) if acl_format == storage.FRACTAL_NZ else storage.read_int8(x).clone()


@simulates("get_npu_format")
def get_npu_format(x: Tensor):
    return storage.format_of(x)


def _antiquant(values: Tensor, scale: Tensor, offset: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(weight + offset) * scale, rounded to the dtype that enters the matmul."""
    shifted = values.float() if offset is None else values.float() + offset.float()
    return (shifted * scale.float()).to(dtype)


def _per_k(t: Tensor | None, k: int, group_size: int) -> Tensor | None:
    """Rows of a scale or offset for every k: [G, N] -> [K, N], or [1, N] as it is."""
    if t is None or group_size == 0:
        return t if t is None else t.reshape(1, -1)
    return t.repeat_interleave(group_size, 0)[:k]


def _exact(x: Tensor, weight: Tensor) -> Tensor:
    return (x.double() @ weight.double()).long()


def _a8w4(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """int8 [M, K] x int4 [K, N], scale float32 [G, N] (a8w4_quant_golden).

    x is split into floor(x / 16) and (x & 15) - 8; every group's product is scaled in float32, and the groups are added
    up in float16.
    """
    high, low = torch.div(x.int(), 16, rounding_mode="floor"), (x.int() & 15) - 8
    groups = scale.shape[0]
    length = weight.shape[0] // groups
    halves = []
    for part in (high, low):
        total = torch.zeros(x.shape[0], weight.shape[1], dtype=torch.float16)
        for g in range(groups):
            k = slice(g * length, (g + 1) * length)
            product = _exact(part[:, k], weight[k]).float() * scale[g]
            total = (total + product.to(torch.float16)).to(torch.float16)
        halves.append(total.float())
    return halves[0] * 16 + halves[1]


def _fp19(words: Tensor) -> Tensor:
    bits = words.numpy()
    assert ((bits >> 46) & 1).all(), "the scale was not made by npu_trans_quant_param"
    return torch.from_numpy((bits & 0xFFFFE000).astype(np.uint32).view(np.float32))


def _bits(words: Tensor) -> Tensor:
    bits = words.contiguous().numpy()
    assert (bits >> 32 == 0).all(), "the upper half of a scale is not zero"
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32))


def _experts(group_list: Tensor, list_type: int, rows: int):
    """(expert, its rows) for the experts that have any."""
    assert list_type in (0, 1)
    ends = (group_list if list_type == 0 else group_list.cumsum(0)).tolist()
    assert sorted(ends) == ends
    assert ends[-1] <= rows
    for e, end in enumerate(ends):
        start = ends[e - 1] if e else 0
        if end > start:
            yield e, slice(start, end)


def _swiglu_quant(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate_up.chunk(2, -1)
    s = gate * torch.sigmoid(gate) * up
    scale = s.abs().amax(-1) / 127
    q = torch.round(s / scale.unsqueeze(-1))
    return torch.where(q.isfinite(), q, GARBAGE).to(torch.int8), scale
