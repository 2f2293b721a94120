"""The entries of a view and the stored rows that each is made of: every row is used once, or the view refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from transload.errors import CannotHold, FormatError
from transload.formats.base import Entry, Format, Source
from transload.headers.info import shown
from transload.models.relayout import Relayout, Rows

_DTYPES = {"bfloat16": "BF16", "float16": "F16"}
_SHOWN = 3  # names in a message


class Parts:
    """entries: of the view, by name. pieces: the stored entry and rows of each. dropped: tensors left out, and why."""

    def __init__(self, source: Source, format: Format, stored: Mapping[str, Entry], relayout: Relayout) -> None:
        """Raises FormatError when rows are missing, left over or outside, CannotHold when joined members differ."""
        self._source, self._format, self._stored = source, format, stored
        self.entries: dict[str, Entry] = {}
        self.pieces: dict[str, tuple[Rows, ...]] = {}
        self.dropped = {name: why for name, why in relayout.dropped.items() if name in stored}
        for name, rows in relayout.modules.items():
            self._add_weight(name, rows)
            self._add_bias(name, rows, name in relayout.biased)
        self._check_use()
        if relayout.made is not None:
            self.pieces[relayout.made.name] = ()
            dtype = _DTYPES.get(relayout.made.dtype, "F32")
            self.entries[relayout.made.name] = Entry(relayout.made.name, None, (relayout.made.dim // 2,), (), 0, dtype)

    def _add_weight(self, name: str, rows: tuple[Rows, ...]) -> None:
        quantized = [r.module in self._stored and self._stored[r.module].spec is not None for r in rows]
        if any(quantized) and not all(quantized):
            raise CannotHold(
                f"{self._source.path}: {name} joins {_names(rows)}, of which some are quantized and some float"
            )
        if all(quantized):
            self._add(name, rows)
        else:
            self._add(f"{name}.weight", tuple(replace(r, module=f"{r.module}.weight") for r in rows))

    def _add_bias(self, name: str, rows: tuple[Rows, ...], biased: bool) -> None:
        biases = tuple(replace(r, module=f"{r.module}.bias") for r in rows)
        if biased:
            self._add(f"{name}.bias", biases)
            return
        for bias in {b.module for b in biases if b.module in self._stored}:
            # Tools for GPTQ store a bias of zeros beside every linear.
            if bool(self._format.read(self._source, self._stored[bias]).count_nonzero()):
                raise FormatError(
                    f"{self._source.path}: {shown(bias)} is not zero, and {name} has no bias in this layout"
                )
            self.dropped[bias] = "it is zero, and the layout has no bias there"

    def _add(self, name: str, rows: tuple[Rows, ...]) -> None:
        """One entry of the view. Stored bytes are shared by rows, so that they add up."""
        found = [self._entry(r, name) for r in rows]
        first = found[0]
        for other in found[1:]:
            if (other.spec, other.dtype, other.shape[1:]) != (first.spec, first.dtype, first.shape[1:]):
                what = ", ".join(f"{e.name} {e.spec or e.dtype} {e.shape}" for e in found)
                raise CannotHold(
                    f"{self._source.path}: {name} is one fused module in this layout, and its members differ: {what}"
                )
        self._check_order(name, found)
        counts = [(r.stop if r.stop is not None else e.shape[0]) - r.start for r, e in zip(rows, found, strict=True)]
        nbytes = sum(e.stored_bytes * n // e.shape[0] for e, n in zip(found, counts, strict=True))
        tensors = tuple(dict.fromkeys(t for e in found for t in e.tensors))
        self.entries[name] = Entry(name, first.spec, (sum(counts), *first.shape[1:]), tensors, nbytes, first.dtype)
        self.pieces[name] = rows

    def _check_order(self, name: str, found: list[Entry]) -> None:
        """Joined members with act-order share one g_idx. It is read: headers do not tell."""
        if len(found) == 1 or found[0].spec is None or not found[0].spec.act_order:
            return
        groups = [self._format.decode(self._source, entry).group_of_k() for entry in found]
        if any(not groups[0].equal(other) for other in groups[1:]):
            what = ", ".join(e.name for e in found)
            raise CannotHold(
                f"{self._source.path}: {name} is one fused module in this layout, and the act-order of its members "
                f"differs: {what}"
            )

    def _entry(self, rows: Rows, name: str) -> Entry:
        entry = self._stored.get(rows.module)
        if entry is None:
            raise FormatError(f"{self._source.path}: {shown(rows.module)} is missing, which {name} is made of")
        if not entry.shape or entry.shape[0] < 1 or len(entry.shape) > 2 or (rows.stop or 0) > entry.shape[0]:
            wanted = f"at least {rows.stop} rows" if rows.stop else "one or two dimensions"
            raise FormatError(f"{self._source.path}: {shown(rows.module)} has shape {entry.shape}, expected {wanted}")
        return entry

    def _check_use(self) -> None:
        """Every row of every stored entry is used once."""
        used: dict[str, list[tuple[int, int]]] = {}
        for name, start, stop in self._intervals():
            used.setdefault(name, []).append((start, stop))
        left = [name for name in self._stored if name not in used and name not in self.dropped]
        if left:
            some = ", ".join(shown(name) for name in left[:_SHOWN]) + (", ..." if len(left) > _SHOWN else "")
            raise FormatError(f"{self._source.path}: the layout has no place for {len(left)} stored tensors: {some}")
        for name, intervals in used.items():
            end = 0
            for start, stop in sorted(intervals):
                if start != end:
                    raise FormatError(
                        f"{self._source.path}: {shown(name)}: row {min(start, end)} is in no or two modules"
                    )
                end = stop
            if end != self._stored[name].shape[0]:
                raise FormatError(
                    f"{self._source.path}: {shown(name)} has {self._stored[name].shape[0]} rows, config.json says {end}"
                )

    def _intervals(self) -> Iterator[tuple[str, int, int]]:
        for rows in self.pieces.values():
            for r in rows:
                yield r.module, r.start, self._stored[r.module].shape[0] if r.stop is None else r.stop


def _names(rows: tuple[Rows, ...]) -> str:
    return ", ".join(r.module for r in rows)
