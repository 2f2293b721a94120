"""Broken checkpoints for readers: one mutation of a good one, which must be refused by name or still decode."""

from __future__ import annotations

import copy

import torch
from hypothesis import strategies as st
from memory_source import MemorySource
from torch import Tensor

from transload.errors import TransloadError
from transload.formats.base import Format

_JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.sampled_from(["", "x", "gptq", [], {}, [1], {"a": 1}, 0.5]),
)


@st.composite
def broken(draw: st.DrawFn, source: MemorySource) -> MemorySource:
    """The source with a tensor dropped, cut, reshaped, cast or filled with extremes, or a JSON value changed."""
    tensors, config, files = dict(source.tensors), copy.deepcopy(source.config), copy.deepcopy(source.files)
    for _ in range(draw(st.integers(1, 2))):
        kind = draw(st.sampled_from(("drop", "cut", "transpose", "cast", "extreme", "flatten", "config", "config")))
        if kind == "config":
            _change_json(draw, draw(st.sampled_from([config, *files.values()])))
        elif tensors:
            name = draw(st.sampled_from(sorted(tensors)))
            changed = _change(draw, kind, tensors.pop(name))
            if changed is not None:
                tensors[name] = changed
    return MemorySource(tensors, config, files)


def survives(fmt: Format, source: MemorySource) -> None:
    """Reads everything; only a TransloadError may come out, and its message is one line that names a file."""
    try:
        if fmt.detects(source):
            for entry in fmt.entries(source).values():
                if entry.spec is not None:
                    w = fmt.decode(source, entry)
                    assert (w.spec, tuple(w.codes.shape)) == (entry.spec, entry.shape)
    except TransloadError as e:
        message = str(e)
    else:
        return
    assert "memory" in message
    assert "\n" not in message


def _change(draw: st.DrawFn, kind: str, t: Tensor) -> Tensor | None:
    if kind == "cut" and t.dim():
        dim = draw(st.integers(0, t.dim() - 1))
        return t.narrow(dim, 0, draw(st.integers(0, t.shape[dim]))).contiguous()
    if kind == "transpose":
        return t.T.contiguous() if t.dim() == 2 else t.unsqueeze(0)
    if kind == "flatten":
        return t.reshape(-1)
    if kind == "cast":
        return t.float().to(draw(st.sampled_from([torch.float16, torch.float32, torch.int8, torch.int32, torch.uint8])))
    if kind == "extreme":
        values = [0, 1, -1, 2**31 - 1, -(2**31)] if not t.is_floating_point() else [float("nan"), float("inf"), -0.0]
        return t.float().fill_(draw(st.sampled_from(values))).to(t.dtype)
    return None


def _change_json(draw: st.DrawFn, value: object) -> None:
    """Replaces, or drops, one value somewhere in a JSON object."""
    while isinstance(value, dict) and value:
        key = draw(st.sampled_from(sorted(value)))
        inner = value[key]
        if isinstance(inner, dict) and inner and draw(st.booleans()):
            value = inner
            continue
        if draw(st.booleans()):
            value[key] = draw(_JUNK)
        else:
            del value[key]
        return
