"""A checkpoint, a folder or one file, that appears under its name only when it is complete.

Everything is written to the folder `<path>.partial` beside the target, synced, and renamed at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from transload.errors import ConfigError, OutputExists
from transload.headers.info import shown
from transload.writer.journal import NAME as JOURNAL
from transload.writer.journal import Journal
from transload.writer.layout import MAX_SHARD_BYTES, Layout, Plan, Shard, Slot, lay_out
from transload.writer.place import check_apart, check_free, check_space, named, os_errors, sync_folder, take_name
from transload.writer.syncing import Syncer

_SYNC_BYTES = 256 << 20


class Writer:
    """Writes one checkpoint; use it in a `with` block.

        with Writer(target, plan, source=source) as writer:
            for name in plan:
                writer.add(name, tensor)                      # any order
            writer.add_json("config.json", config)
            writer.carry(source / "tokenizer.json")

    When the block ends well every planned tensor must be there; the folder then takes its name in one rename. When it
    ends with an exception, nothing appears under the name: the partial folder is removed, or kept with `resume=True`.
    A run that was killed leaves the partial folder too; the same plan and `job` with `resume=True` continue it,
    `finished` says what is there already, and the result has the same bytes as an uninterrupted run.
    """

    def __init__(
        self,
        path: str | Path,
        plan: Plan | Layout,
        *,
        source: str | Path | None = None,
        overwrite: bool = False,
        resume: bool = False,
        job: str = "",
        max_shard_bytes: int = MAX_SHARD_BYTES,
        stem: str = "model",
        sync_bytes: int = _SYNC_BYTES,
    ) -> None:
        """Checks everything that can be checked before writing; nothing is created yet.

        plan: dtype and shape of every tensor, in the order of the shards of a safetensors folder; or a layout of
        another container, whose shards are then its own matter. source: what is read meanwhile; the target
        may not touch it. overwrite: replace an existing checkpoint at the end. job: tells apart ports whose plans are
        equal (source, its size and time, options). stem: name of the weight files. sync_bytes: a killed run loses at
        most about this much finished work. Raises OutputExists or ConfigError.
        """
        self.path = named(Path(path))
        self.partial = self.path.with_name(self.path.name + ".partial")
        self.finished: frozenset[str] = frozenset()
        self.layout = plan if isinstance(plan, Layout) else lay_out(plan, max_shard_bytes, stem)
        self._shards, self._slots = self.layout.shards, self.layout.slots
        self._stem, self._overwrite, self._resume, self._sync_bytes = stem, overwrite, resume, sync_bytes
        headers = b"".join(shard.header for shard in self._shards)
        self._job = hashlib.sha256(headers + b"\0" + job.encode()).hexdigest()
        self._files: dict[str, int] = {}  # descriptors of the shards
        self._added: set[str] = set()
        self._others: set[str] = set()  # names of the files that hold no tensors
        self._pending: list[str] = []  # written, not yet known to be on the disk
        self._pending_bytes = 0
        self._journal: Journal | None = None
        self._syncer: Syncer | None = None
        if source is not None:
            check_apart(self.path, Path(source))
        check_free(self.path, overwrite, self.layout.single)
        if self.partial.exists() and not (resume or overwrite):
            raise OutputExists(f"{self.partial}: is left from an unfinished run; resume it or delete it")

    @property
    def total_bytes(self) -> int:
        """Bytes of all planned tensors."""
        return self.layout.total_bytes

    def __enter__(self) -> Writer:
        with os_errors(self.partial):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.partial.exists() and not self._resume:
                Journal(self.partial, None).close()  # raises when another process is at work there
                shutil.rmtree(self.partial)
            self.partial.mkdir(exist_ok=self._resume)
        try:
            with os_errors(self.partial):
                self._begin()
        except BaseException:
            self._abandon()
            raise
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one planned tensor to its place. One that an earlier run finished is left as it is.

        Raises ConfigError when the tensor is not the planned one or comes twice.
        """
        slot = self._slots.get(name)
        if slot is None:
            raise ConfigError(f"{self.path}: tensor {shown(name)} is not planned")
        if tensor.dtype != slot.dtype or tuple(tensor.shape) != tuple(slot.shape):
            found, wanted = f"{tensor.dtype} {tuple(tensor.shape)}", f"{slot.dtype} {tuple(slot.shape)}"
            raise ConfigError(f"{self.path}: tensor {shown(name)} is {found}, planned was {wanted}")
        if name in self._added:
            raise ConfigError(f"{self.path}: tensor {shown(name)} comes twice")
        self._added.add(name)
        if name in self.finished:
            return
        with os_errors(self.partial / slot.file):
            _write_at(self._files[slot.file], slot, tensor)
            self._pending.append(name)
            self._pending_bytes += slot.nbytes
            if self._pending_bytes >= self._sync_bytes:
                self.flush()

    def flush(self) -> None:
        """Begins to bring what is written to the disk and to record it, without waiting for either."""
        if self._syncer is None or not self._pending:
            return
        files = sorted({self._slots[name].file for name in self._pending})
        with os_errors(self.partial):
            self._syncer.start([self._files[file] for file in files], self._pending)
        self._pending, self._pending_bytes = [], 0

    def add_json(self, name: str, value: Mapping[str, object]) -> None:
        """Writes a JSON file beside the weights. Raises ConfigError when the name is taken."""
        self.add_bytes(name, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())

    def add_bytes(self, name: str, data: bytes) -> None:
        """Writes any other file beside the weights. Raises ConfigError when the name is taken."""
        target = self._claim(name)
        with os_errors(target):
            target.write_bytes(data)

    def carry(self, file: str | Path, name: str | None = None) -> None:
        """Copies a file, following links, beside the weights. Raises ConfigError when it is missing."""
        if not Path(file).is_file():
            raise ConfigError(f"{file}: no such file, so it cannot be carried to {self.path}")
        target = self._claim(name or Path(file).name)
        with os_errors(target):
            shutil.copyfile(file, target)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._abandon()
            return
        try:
            with os_errors(self.path):
                self._complete()
        except BaseException:
            self._abandon()
            raise

    def _begin(self) -> None:
        """Opens the journal and the shards; fresh shards get their header and their full, still empty, size."""
        self._journal = Journal(self.partial, self._job)
        self._syncer = Syncer(self._journal)
        self.finished = self._journal.finished & self._slots.keys()
        self._remove_others()
        check_space(self.partial, sum(s.nbytes for name, s in self._slots.items() if name not in self.finished))
        for shard in self._shards:
            path = self.partial / shard.file
            self._files[shard.file] = descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if _is_fresh(descriptor, shard):
                if any(self._slots[name].file == shard.file for name in self.finished):
                    raise ConfigError(f"{path}: is not what the journal says; delete its folder and start again")
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, shard.header, 0)
                os.ftruncate(descriptor, shard.size)

    def _remove_others(self) -> None:
        """Removes what an earlier run left beside the shards: this run writes it again."""
        keep = {JOURNAL, *(shard.file for shard in self._shards)}
        for path in self.partial.iterdir():
            if path.name not in keep:
                path.unlink()

    def _claim(self, name: str) -> Path:
        taken = (
            {shard.file for shard in self._shards} | self._others | {JOURNAL, f"{self._stem}.safetensors.index.json"}
        )
        if not name or name in taken or Path(name).name != name:
            raise ConfigError(f"{self.path}: {shown(name)} is taken or is no plain file name")
        self._others.add(name)
        return self.partial / name

    def _complete(self) -> None:
        missing = [name for name in self._slots if name not in self._added and name not in self.finished]
        if missing:
            some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ConfigError(f"{self.path}: {len(missing)} planned tensors were not written: {some}")
        for name, data in self.layout.beside.items():
            (self.partial / name).write_bytes(data)
        self.flush()
        assert self._syncer is not None
        self._syncer.wait()
        for name in self._others | self.layout.beside.keys():
            _sync_file(self.partial / name)
        self._close()
        (self.partial / JOURNAL).unlink()
        sync_folder(self.partial)
        check_free(self.path, self._overwrite, self.layout.single)  # again: it may have come up meanwhile
        if self.layout.single:
            os.replace(self.partial / self._shards[0].file, self.path)
            sync_folder(self.path.parent)
            shutil.rmtree(self.partial)
        else:
            take_name(self.partial, self.path)

    def _abandon(self) -> None:
        """Ends without a result; the partial folder stays only for a run that may be resumed."""
        self._close()
        if not self._resume:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _close(self) -> None:
        if self._syncer is not None:
            self._syncer.close()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}
        if self._journal is not None:
            self._journal.close()


def _is_fresh(descriptor: int, shard: Shard) -> bool:
    """True when a shard file is not yet the one that the layout asks for."""
    if os.fstat(descriptor).st_size != shard.size:
        return True
    return os.pread(descriptor, len(shard.header), 0) != shard.header


def _write_at(descriptor: int, slot: Slot, tensor: Tensor) -> None:
    if not slot.nbytes:
        return
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    written = 0
    while written < slot.nbytes:  # one call writes at most 2 GiB
        written += os.pwrite(descriptor, data[written:], slot.start + written)


def _sync_file(path: Path) -> None:
    with path.open("rb") as f:
        os.fsync(f.fileno())
