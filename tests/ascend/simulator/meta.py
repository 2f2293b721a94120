"""Registers CPU kernels under torch_npu's operator names, each behind the operator's real meta kernel.

A call on CPU tensors runs twice: through torch_npu's own meta kernel, which judges dtypes and shapes as it would for a
graph, and through the simulated arithmetic. Both must agree on what comes out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CALLS: Counter[str] = Counter()  # how often every operator was reached
NO_META_KERNEL = {"npu_convert_weight_to_int4pack", "npu_format_cast", "get_npu_format"}  # torch_npu 2.13.0 has none

_library = torch.library.Library("npu", "IMPL")


def simulates(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as the CPU kernel of torch.ops.npu.<name>."""

    def register(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def checked(*args: Any, **kwargs: Any) -> Any:
            CALLS[name] += 1
            expected = None if name in NO_META_KERNEL else _described(_on_meta(name, args, kwargs))
            result = kernel(*args, **kwargs)
            assert expected is None or _described(result) == expected, (
                f"{name}: the simulator made {_described(result)}, the meta kernel {expected}"
            )
            return result

        _library.impl(name, checked, "CPU")
        return kernel

    return register


def _on_meta(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    operator = getattr(torch.ops.npu, name).default
    return operator(*(_meta(a) for a in args), **{key: _meta(a) for key, a in kwargs.items()})


def _meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return [_meta(v) for v in value] if isinstance(value, (list, tuple)) else value


def _described(result: Any) -> list[tuple[tuple[int, ...], torch.dtype]]:
    tensors = [result] if isinstance(result, Tensor) else list(result)
    return [(tuple(t.shape), t.dtype) for t in tensors]
