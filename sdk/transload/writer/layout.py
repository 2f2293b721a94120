"""Where every tensor of a new checkpoint will lie, decided before the first byte is written.

A safetensors header comes first in its file and names every offset. With all shapes known in advance the headers can
be written at once, and tensors go to their places in any order: memory is one tensor, and a second run gives the same
bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TypeAlias

import torch

from transload.errors import ConfigError
from transload.headers import DTYPE_BITS
from transload.headers.info import shown
from transload.source import DTYPE_NAMES

Plan: TypeAlias = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor: file name, and the bytes [start, start + nbytes) in it.

    The file calls these bytes `tensor`; they begin `offset` bytes into it, because a stack of experts is one tensor of
    a GGUF file and arrives expert by expert.
    """

    file: str
    start: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    tensor: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its first bytes and its final size."""

    file: str
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything of a new checkpoint lies. beside: small files known in advance, such as an index.

    single: the result is not a folder but its only file.
    """

    shards: tuple[Shard, ...]
    slots: Mapping[str, Slot]
    beside: Mapping[str, bytes] = field(default_factory=dict)
    single: bool = False

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(slot.nbytes for slot in self.slots.values())


def lay_out(plan: Plan, max_shard_bytes: int = MAX_SHARD_BYTES, stem: str = "model") -> Layout:
    """The shards of a plan and the slot of every tensor, in the plan's order, as a folder of safetensors.

    Shards follow the plan's order and hold at most `max_shard_bytes` of tensors (one larger tensor has a shard of its
    own); inside a shard wide elements come first, so that every tensor is aligned to its element. One shard is called
    `<stem>.safetensors`, several `<stem>-00001-of-0000n.safetensors`. Raises ConfigError for dtypes that safetensors
    lacks.
    """
    if max_shard_bytes < 1:
        raise ConfigError(f"max_shard_bytes {max_shard_bytes}: give a positive number of bytes")
    groups = _split({name: _stored(name, *entry) for name, entry in plan.items()}, max_shard_bytes)
    shards: list[Shard] = []
    slots: dict[str, Slot] = {}
    for i, group in enumerate(groups, 1):
        file = f"{stem}.safetensors" if len(groups) == 1 else f"{stem}-{i:05d}-of-{len(groups):05d}.safetensors"
        ordered = sorted(group.items(), key=lambda item: -DTYPE_BITS[item[1][0]])
        header = _header(ordered)
        position = len(header)
        for name, (_, _, nbytes) in ordered:
            slots[name] = Slot(file, position, nbytes, *plan[name], name)
            position += nbytes
        shards.append(Shard(file, header, position))
    ordered_slots = {name: slots[name] for name in plan}
    return Layout(tuple(shards), ordered_slots, _index(ordered_slots, stem) if len(shards) > 1 else {})


def _index(slots: Mapping[str, Slot], stem: str) -> dict[str, bytes]:
    """The file that says which shard holds a tensor."""
    total = sum(slot.nbytes for slot in slots.values())
    index = {"metadata": {"total_size": total}, "weight_map": {name: slots[name].file for name in sorted(slots)}}
    return {f"{stem}.safetensors.index.json": (json.dumps(index, indent=2) + "\n").encode()}


_Stored: TypeAlias = tuple[str, tuple[int, ...], int]  # safetensors' dtype and shape, bytes


def _stored(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> _Stored:
    if dtype == torch.float4_e2m1fn_x2 and shape:
        code, shape = "F4", (*shape[:-1], shape[-1] * 2)
    elif dtype in DTYPE_NAMES and name != "__metadata__":
        code = DTYPE_NAMES[dtype]
    else:
        raise ConfigError(f"tensor {shown(name)}: safetensors cannot store it as {dtype} {tuple(shape)}")
    return code, tuple(shape), prod(shape) * DTYPE_BITS[code] // 8


def _split(stored: Mapping[str, _Stored], max_shard_bytes: int) -> list[dict[str, _Stored]]:
    groups: list[dict[str, _Stored]] = [{}]
    total = 0
    for name, entry in stored.items():
        if groups[-1] and total + entry[2] > max_shard_bytes:
            groups.append({})
            total = 0
        groups[-1][name] = entry
        total += entry[2]
    return groups


def _header(ordered: list[tuple[str, _Stored]]) -> bytes:
    """u64 length and JSON, padded with spaces to a multiple of 8."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (code, shape, nbytes) in ordered:
        entries[name] = {"dtype": code, "shape": shape, "data_offsets": (start, start + nbytes)}
        start += nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
