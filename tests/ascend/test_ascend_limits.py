"""Every documented limit of every operator: one call that keeps all of them, and one call that breaks just this one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from transload_ascend.limits import Limit, grouped, objection, quant_matmul, tensors, weight_quant
from transload_ascend.products import Product

FP32, BF16, FP16, INT8, INT32, INT64 = (
    torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int32, torch.int64,
)  # fmt: skip
A2, P310, A5 = Product.A2, Product.P310, Product.A5


@dataclass(frozen=True)
class Table:
    """An operator's limits, a good call, and for every limit the change that breaks it and none before it."""

    operator: str
    limits: Sequence[Limit[Any]]
    good: Any
    bad: dict[str, dict[str, Any]]


WQ = weight_quant.Call(A2, BF16, 5, 512, 192, 128, BF16, (4, 192), offset_dtype=BF16, offset_shape=(4, 192),
                       bias_dtype=FP32, bias_shape=(192,))  # fmt: skip
CHANNEL: dict[str, Any] = {"group_size": 0, "scale_shape": (1, 192), "offset_shape": None, "offset_dtype": None}
NZ = {"nz": True, "offset_shape": None, "offset_dtype": None}

W8A8 = quant_matmul.Call(A2, 5, 512, 192, FP32, (192,), (5,), BF16)
A8W4 = quant_matmul.Call(A2, 5, 512, 192, INT64, (2, 192), (5, 1), BF16, weight_dtype=INT32, offset_dtype=FP32,
                         offset_shape=(192,))  # fmt: skip
QUANT_BOTH: dict[str, dict[str, Any]] = {
    "x-dtype": {"x_dtype": BF16},
    "2d": {"x_dims": 3},
    "k-match": {"weight_k": 256},
    "not-empty": {"m": 0},
    "output-dtype": {"output_dtype": FP32},
    "token-dtype": {"token_dtype": BF16},
}

G16 = grouped.Call(A2, 4, 9, 512, 192, BF16, INT32, BF16, (4, 4, 192), BF16, groups=4, offset_shape=(4, 4, 192),
                   offset_dtype=BF16)  # fmt: skip
G48 = grouped.Call(A2, 4, 9, 512, 192, INT8, INT32, INT64, (4, 2, 192), BF16, groups=2, list_type=1, token_dtype=FP32,
                   token_shape=(9,), bias_dtype=FP32, bias_shape=(4, 192))  # fmt: skip
G88 = grouped.Call(A2, 4, 9, 512, 192, INT8, INT8, BF16, (4, 192), BF16, token_dtype=FP32, token_shape=(9,))
SUMS = replace(G88, scale_dtype=None, scale_shape=None, output_dtype=INT32)
SWIGLU = replace(G48, list_type=0)
GROUPED_ALL: dict[str, dict[str, Any]] = {
    "product": {"product": P310},
    "dims": {"weight_dims": 2},
    "k-match": {"weight_k": 256},
    "not-empty": {"m": 0},
    "experts": {"experts": 1025},
    "inner-size": {"n": 65536},
    "list-dtype": {"list_dtype": INT32},
    "list-shape": {"list_shape": (3,)},
    "list-type": {"list_type": 2},
}
GROUPED_INT4: dict[str, dict[str, Any]] = {
    "weight-dtype": {"weight_dtype": INT8},
    "weight-contiguous": {"weight_contiguous": False},
    "int4-lanes": {"n": 196},
    "group-divides": {"groups": 3},
}
TOKEN_AND_BIAS: dict[str, dict[str, Any]] = {"token-scale": {"token_shape": (9, 1)}, "bias": {"bias_shape": None}}

ONE = tensors.Call(A2, FP16, (5, 64))
PACK = tensors.Call(A2, INT32, (16, 64), low=-8, high=7)
SCALES = tensors.Call(A2, FP32, (64,))
CAST = tensors.Call(A2, INT8, (32, 64))
DEQUANT = tensors.SwigluCall(A2, INT32, (9, 256), 4, FP32, (4, 256), FP32, (9, 1))

TABLES = [
    Table("npu_weight_quant_batchmatmul", weight_quant.LIMITS, WQ, {
        "int4-product": {"product": P310},
        "x-dtype": {"x_dtype": FP32},
        "x-2d": {"x_dims": 3},
        "weight-dtype": {"weight_dtype": INT8},
        "k-match": {"weight_k": 256},
        "not-empty": {"m": 0},
        "inner-size": {"k": 65536},
        "rows": {"m": 65536, "x_transposed": True},
        "int4-lanes": {"n": 196, "scale_shape": (4, 196)},
        "transposed-shape": {"transposed": True, "k": 8, "group_size": 0},
        "group-multiple": {"group_size": 48},
        "group-below-k": {"group_size": 512},
        "scale-dtype": {"scale_dtype": FP32},
        "scale-shape": {"scale_shape": (192, 4)},
        "offset-shape": {"offset_shape": (1, 192)},
        "offset-dtype": {"offset_dtype": FP32},
        "bias-dtype": {"bias_dtype": BF16},
        "bias-shape": {"bias_shape": (191,)},
        "bias-contiguous": {"bias_contiguous": False},
        "inner-precise": {"inner_precise": 1},
        "nz-channel-transposed": dict(nz=True, **CHANNEL),
        "nz-group-straight": {"nz": True, "transposed": True},
        "nz-group-size": dict(group_size=256, scale_shape=(2, 192), **NZ),
        "nz-group-k": dict(k=480, scale_shape=(4, 192), **NZ),
        "nz-group-n": dict(n=200, scale_shape=(4, 200), bias_shape=(200,), **NZ),
    }),
    Table("npu_quant_matmul", quant_matmul.W8A8_LIMITS, W8A8, {
        "w8a8-product": {"product": A5},
        **QUANT_BOTH,
        "inner-size": {"n": 65536},
        "weight-dtype": {"weight_dtype": INT32},
        "310p-output": {"product": P310},
        "token-shape": {"token_shape": (5, 1)},
        "scale-shape": {"scale_shape": (1, 192)},
        "scale-dtype": {"scale_dtype": BF16, "output_dtype": FP16},
        "no-offset": {"offset_shape": (192,)},
        "bias-shape": {"bias_shape": (1, 192)},
        "bias-dtype": {"bias_shape": (192,), "bias_dtype": FP16},
    }),
    Table("npu_quant_matmul", quant_matmul.A8W4_LIMITS, A8W4, {
        "a8w4-product": {"product": P310},
        **QUANT_BOTH,
        "inner-size": {"k": 65536},
        "weight-dtype": {"weight_dtype": INT8},
        "weight-contiguous": {"weight_contiguous": False},
        "int4-lanes": {"n": 196},
        "group-256": {"k": 384},
        "scale-dtype": {"scale_dtype": FP32},
        "scale-shape": {"scale_shape": (192,)},
        "token-shape": {"token_shape": (5,)},
        "offset": {"offset_shape": None},
        "bias": {"bias_dtype": FP32, "bias_shape": (192,)},
    }),
    Table("npu_grouped_matmul", grouped.W4A16_LIMITS, G16, {
        **GROUPED_ALL, **GROUPED_INT4,
        "x-dtype": {"x_dtype": FP32},
        "output-dtype": {"output_dtype": FP16},
        "scale-dtype": {"scale_dtype": FP32},
        "scale-shape": {"scale_shape": (4, 192)},
        "offset": {"offset_shape": None},
    }),
    Table("npu_grouped_matmul", grouped.W4A8_LIMITS, G48, {
        **GROUPED_ALL, **GROUPED_INT4, **TOKEN_AND_BIAS,
        "x-dtype": {"x_dtype": BF16},
        "counts": {"list_type": 0},
        "output-dtype": {"output_dtype": FP32},
        "scale-dtype": {"scale_dtype": FP32},
        "scale-shape": {"scale_shape": (4, 192)},
        "group-256": {"groups": 4, "scale_shape": (4, 4, 192)},
    }),
    Table("npu_grouped_matmul", grouped.W8A8_LIMITS, G88, {
        **GROUPED_ALL,
        "x-dtype": {"x_dtype": BF16},
        "weight-dtype": {"weight_dtype": INT32},
        "scale-dtype": {"scale_dtype": FP32},
        "scale-shape": {"scale_shape": (4, 1, 192)},
        "token-scale": {"token_dtype": BF16},
        "bias": {"bias_dtype": FP32, "bias_shape": (4, 192)},
    }),
    Table("npu_grouped_matmul", grouped.INT8_SUMS_LIMITS, SUMS, {
        **GROUPED_ALL,
        "x-dtype": {"x_dtype": BF16},
        "weight-dtype": {"weight_dtype": INT32},
        "output-dtype": {"output_dtype": FP32},
    }),
    Table("npu_grouped_matmul_swiglu_quant_v2", grouped.SWIGLU_LIMITS, SWIGLU, {
        **GROUPED_ALL, **GROUPED_INT4, **TOKEN_AND_BIAS,
        "x-dtype": {"x_dtype": BF16},
        "swiglu-n": {"n": 10248},
        "swiglu-k": {"k": 20000},
        "scale-dtype": {"scale_dtype": FP32},
        "scale-shape": {"scale_shape": (4, 192)},
    }),
    Table("npu_dynamic_quant", tensors.DYNAMIC_QUANT, ONE, {
        "product": {"product": A5},
        "x-dtype": {"dtype": FP32},
        "dims": {"shape": (64,)},
    }),
    Table("npu_convert_weight_to_int4pack", tensors.INT4PACK, PACK, {
        "product": {"product": P310},
        "dtype": {"dtype": INT8},
        "2d": {"shape": (2, 16, 64)},
        "not-empty": {"shape": (0, 64)},
        "lanes": {"shape": (16, 60)},
        "contiguous": {"contiguous": False},
        "range": {"high": 8},
    }),
    Table("npu_trans_quant_param", tensors.TRANS_QUANT_PARAM, SCALES, {
        "product": {"product": A5},
        "dtype": {"dtype": FP16},
        "shape": {"shape": (4, 16)},
        "not-empty": {"shape": (0,)},
        "contiguous": {"contiguous": False},
    }),
    Table("npu_format_cast", tensors.FORMAT_CAST, CAST, {
        "product": {"product": P310},
        "dtype": {"dtype": INT32},
        "dims": {"shape": (1, 1, 32, 64)},
        "rows": {"shape": (24, 64)},
        "columns": {"shape": (32, 48)},
        "contiguous": {"contiguous": False},
    }),
    Table("npu_dequant_swiglu_quant", tensors.DEQUANT_SWIGLU, DEQUANT, {
        "product": {"product": P310},
        "x-dtype": {"x_dtype": BF16},
        "x-shape": {"x_shape": (9, 255)},
        "width": {"x_shape": (9, 21056)},
        "scale": {"scale_shape": (256,)},
        "token-scale": {"token_shape": (9,)},
        "list-dtype": {"list_dtype": INT32},
    }),
]  # fmt: skip

ROWS = [
    pytest.param(table, name, id=f"{table.operator}-{i}-{name}") for i, table in enumerate(TABLES) for name in table.bad
]


@pytest.mark.parametrize("table", TABLES, ids=lambda t: t.operator)
def test_the_good_call_keeps_every_limit_and_every_limit_has_a_bad_call(table: Table) -> None:
    assert objection(table.operator, table.limits, table.good) is None
    assert {limit.name for limit in table.limits} == set(table.bad)
    assert len({limit.name for limit in table.limits}) == len(table.limits)


@pytest.mark.parametrize(("table", "name"), ROWS)
def test_a_call_beyond_one_limit_is_refused_with_the_limit_what_was_found_and_the_source(
    table: Table, name: str
) -> None:
    (limit,) = (limit for limit in table.limits if limit.name == name)
    call = replace(table.good, **table.bad[name])
    sentence = objection(table.operator, table.limits, call)
    assert sentence == f"{table.operator}: {limit.rule}; found {limit.found(call)} ({limit.source})"
    assert len(limit.source) > 2


def test_messages_show_values_as_a_user_writes_them() -> None:
    sentence = objection("npu_weight_quant_batchmatmul", weight_quant.LIMITS, replace(WQ, scale_shape=(192, 4)))
    assert sentence is not None
    assert "found scale_shape=192x4, n=192, k=512, group_size=128" in sentence
    sentence = objection("npu_weight_quant_batchmatmul", weight_quant.LIMITS, replace(WQ, product=P310))
    assert sentence is not None
    assert "found product=Atlas inference series (310P)" in sentence
    assert "W8A8" in sentence
