"""Every documented limit of every operator as a page: python -m transload_ascend.limits > docs/ascend-limits.md"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transload_ascend.limits import Limit, grouped, quant_matmul, tensors, weight_quant

_HEAD = """# Limits of torch_npu's operators

Made by `python -m transload_ascend.limits` from the data that is checked before every call; a test keeps this page and
the data equal. Each limit has one call that breaks only it, in `tests/ascend/test_ascend_limits.py` under the name in
the first column. Sources are spelled out in `backends/transload_ascend/limits/__init__.py`.
"""

TABLES: tuple[tuple[str, Sequence[Limit[Any]]], ...] = (
    ("npu_weight_quant_batchmatmul, W4A16", weight_quant.LIMITS),
    ("npu_quant_matmul, W8A8", quant_matmul.W8A8_LIMITS),
    ("npu_quant_matmul, int8 x int4", quant_matmul.A8W4_LIMITS),
    ("npu_grouped_matmul, W4A16", grouped.W4A16_LIMITS),
    ("npu_grouped_matmul, W4A8", grouped.W4A8_LIMITS),
    ("npu_grouped_matmul, W8A8", grouped.W8A8_LIMITS),
    ("npu_grouped_matmul, int8 sums", grouped.INT8_SUMS_LIMITS),
    ("npu_grouped_matmul_swiglu_quant_v2, W4A8", grouped.SWIGLU_LIMITS),
    ("npu_dequant_swiglu_quant", tensors.DEQUANT_SWIGLU),
    ("npu_dynamic_quant", tensors.DYNAMIC_QUANT),
    ("npu_convert_weight_to_int4pack", tensors.INT4PACK),
    ("npu_trans_quant_param", tensors.TRANS_QUANT_PARAM),
    ("npu_format_cast, packed int4", tensors.FORMAT_CAST),
)


def page() -> str:
    """The page, Markdown."""
    parts = [_HEAD]
    for title, limits in TABLES:
        rows = "\n".join(f"| {limit.name} | {limit.rule} | {limit.source} |" for limit in limits)
        parts.append(f"## {title}\n\n| limit | rule | source |\n| --- | --- | --- |\n{rows}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(page(), end="")
