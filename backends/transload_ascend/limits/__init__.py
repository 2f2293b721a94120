"""The operators' documented limits, as data: each is a rule with its source, checked before torch_npu is called.

Several of these are checked by nothing in torch_npu before the device fails ("EZ1001", "161002") or answers with
garbage. A limit looks at a *call*: a small dataclass of shapes, dtypes and flags. The operators' wrappers (`ops`) make
one from tensors, the kernels' `refuses` makes one from a problem, so that both say the same sentence.

Sources, all of github Ascend/op-plugin 517f2e7d: "OPDOC x" is docs/zh/custom_APIs/torch_npu/torch_npu-x.md (some names
begin with "(beta)"), "META x" is op_plugin/python/meta/_meta_registrations.py, "OPSRC x" is op_plugin/ops/opapi/x,
"OPTEST x" is test/test_custom_ops/x.
"PTA x" is github Ascend/pytorch 9e73e708, "VA x" vllm-ascend 182b75ea, "VA023 x" its release 0.23.0, "issue n" is
vllm-project/vllm-ascend n.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from transload.errors import Unsupported

C = TypeVar("C")

INNER = 65535  # longest inner axis of a matmul operand

_REMEMBERED = 1 << 14
_PASSED: set[tuple[int, object]] = set()  # tables of limits are module constants, so that their ids stay


@dataclass(frozen=True, slots=True)
class Limit(Generic[C]):
    """One rule of one operator. `shows` names the fields of the call that the message prints."""

    name: str
    rule: str
    source: str
    holds: Callable[[C], bool]
    shows: tuple[str, ...]

    def found(self, call: C) -> str:
        """The values that broke the rule: "group_size=48, k=4096"."""
        return ", ".join(f"{field}={_word(getattr(call, field))}" for field in self.shows)


def objection(operator: str, limits: Sequence[Limit[C]], call: C) -> str | None:
    """The first broken limit as a sentence with what was found and the source; None when all hold."""
    for limit in limits:
        if not limit.holds(call):
            return f"{operator}: {limit.rule}; found {limit.found(call)} ({limit.source})"
    return None


def check(operator: str, limits: Sequence[Limit[C]], call: C) -> None:
    """Raises Unsupported with the sentence of the first broken limit.

    A call that has passed once is let through: decoding makes the same few hundred calls for every token.
    """
    key = (id(limits), call)
    if key in _PASSED:
        return
    reason = objection(operator, limits, call)
    if reason is not None:
        raise Unsupported(reason)
    if len(_PASSED) < _REMEMBERED:
        _PASSED.add(key)


def _word(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value)) or "scalar"
    return str(getattr(value, "value", value)).removeprefix("torch.")
