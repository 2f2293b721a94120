"""Packed weights kept beside a checkpoint, so that a second start maps them instead of decoding and packing again.

One file holds the weights of all modules whose kernel names a layout (`Kernel.layout`). It is bound to the checkpoint
by names, sizes and times of its files, by samples of their bytes, by all tensor headers and JSON files, and to the
versions of Transload and transformers. A file that is bound to anything else, or damaged in a single byte, is written
anew. Schemes share a file: activations are not part of a packed weight.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import transformers
import xxhash
from torch import Tensor

from transload import __version__
from transload.checkpoint import Checkpoint
from transload.errors import ConfigError, FormatError, NoKernel
from transload.hal import Packed
from transload.runtime.below import KeptWeight
from transload.runtime.embedding import RowStore
from transload.runtime.kept import KeptPart
from transload.runtime.packed_file import read, write
from transload.runtime.placement import Target, place
from transload.runtime.weight import AnyWeight, PackedWeight, SplitWeight

SUFFIX = ".packed"
_SAMPLES, _SAMPLE = 16, 4096  # places in each file whose bytes are part of the binding, and how many there


class PackedCache:
    """The packed weights of one checkpoint on their way from a file into a model, or the other way.

    path: the file. outcome: a sentence for the report, once the model is filled.
    """

    def __init__(self, where: bool | str | Path, checkpoint: Checkpoint) -> None:
        """Reads what is kept already. Raises ConfigError when nothing is, and the place cannot be written."""
        self.path = _path(where, checkpoint)
        self.outcome = ""
        self._binding = binding(checkpoint)
        self._kept: dict[str, KeptWeight] = {}
        self._used: set[str] = set()
        self._why = ""
        if self.path.exists():
            try:
                self._kept = read(self.path, self._binding)
            except FormatError as e:
                self._why = str(e)
        if not self._kept:
            _check_writable(self.path)

    def weight(self, parameter: str, to: Target, looked_up: bool) -> KeptWeight | None:
        """The kept weight of a parameter when it is what would be packed for this target now; otherwise None.

        looked_up: the parameter belongs to embeddings only, which keep rows and need no kernel.
        """
        found = self._kept.get(parameter)
        if found is None or to.torch_device.type != "cpu":
            return None
        try:
            for part in found.parts:
                _check(part, to, looked_up)
        except (FormatError, NoKernel) as e:
            self._why = self._why or f"{self.path}: {parameter}: {e}"
            return None
        self._used.add(parameter)
        return found

    def finish(self, weights: Mapping[str, AnyWeight | RowStore]) -> None:
        """Writes the file when weights that can be kept did not come from it. A warning says when that fails."""
        kept = {name: w for name, module in weights.items() if (w := _kept(module)) is not None}
        mapped = sum(_nbytes(self._kept[name]) for name in self._used)
        self._kept = {}
        if kept.keys() <= self._used:
            self.outcome = (
                f"packed weights mapped from {self.path} ({mapped / 1e6:.1f} MB)"
                if self._used
                else ("no packed weights are kept: no kernel of this model has a layout for files")
            )
            return
        try:
            write(self.path, self._binding, kept)
        except OSError as e:
            self.outcome = f"packed weights are not kept: {self.path} cannot be written: {e.strerror or e}"
            warnings.warn(self.outcome, stacklevel=2)
            return
        size = sum(map(_nbytes, kept.values()))
        self.outcome = f"packed weights written to {self.path} ({size / 1e6:.1f} MB)"
        if self._why:
            self.outcome += f"; what was there was not used: {self._why}"


def binding(checkpoint: Checkpoint) -> str:
    """What a file of packed weights must have been made from, as XXH3. It guards against accidents, not forgers."""
    digest = xxhash.xxh3_128()
    infos = checkpoint.source.infos
    tensors = sorted((name, i.file.name, i.dtype, list(i.shape), i.start, i.end) for name, i in infos.items())
    reader = [checkpoint.format.name, type(checkpoint.format).__name__]
    facts = [__version__, transformers.__version__, reader, checkpoint.config, tensors]
    digest.update(json.dumps(facts, default=str).encode())
    for path in sorted({info.file for info in infos.values()}):
        digest.update(_sampled(path))
    folder = checkpoint.path if checkpoint.path.is_dir() else None
    for path in sorted(folder.glob("*.json")) if folder is not None else ():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _sampled(path: Path) -> bytes:
    """Name, size, time of the last change, and bytes from places spread over a file."""
    with path.open("rb", buffering=0) as file:
        stat = os.fstat(file.fileno())
        parts = [f"{path.name} {stat.st_size} {stat.st_mtime_ns} ".encode()]
        for i in range(_SAMPLES):
            file.seek(i * max(0, stat.st_size - _SAMPLE) // (_SAMPLES - 1))
            parts.append(file.read(_SAMPLE))
    return b"".join(parts)


def _path(where: bool | str | Path, checkpoint: Checkpoint) -> Path:
    """True: beside the checkpoint. A folder: a file of the checkpoint's name in it. Else the file itself."""
    own = checkpoint.path
    if where is True:
        return own / f"transload{SUFFIX}" if own.is_dir() else own.with_name(own.name + SUFFIX)
    path = Path(str(where))
    if path.is_dir():
        place = xxhash.xxh3_64(str(own.resolve()).encode()).hexdigest()[:8]
        return path / f"{own.name}-{place}{SUFFIX}"
    if path.suffix != SUFFIX:
        raise ConfigError(f"packed_cache '{path}': give True, a folder that exists, or a file that ends in {SUFFIX}")
    return path


def _check_writable(path: Path) -> None:
    """Raises ConfigError before any work is done for nothing."""
    probe = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        probe.open("xb").close()
        probe.unlink()
    except OSError as e:
        raise ConfigError(
            f"packed_cache: {path.parent} cannot be written ({e.strerror or e}): give packed_cache=PATH, a folder "
            "that can, or leave it out"
        ) from e


def _check(part: KeptPart, to: Target, looked_up: bool) -> None:
    """Raises FormatError or NoKernel when the part is not what would be packed for the target."""
    if looked_up:
        RowStore.check(part)
        return
    placed = place(part.blank(), to)
    kernel = placed.choice.kernel
    if kernel.layout != part.layout:
        raise FormatError(f"kernel '{kernel.name}' packs {kernel.layout or 'for itself'}, not {part.layout}")
    kernel.verify(Packed(kernel.name, part.spec, part.n, part.k, part.tensors, part.experts))


def _kept(weight: AnyWeight | RowStore) -> KeptWeight | None:
    """What is to be written of a weight; None for one that cannot be kept, or that lies elsewhere by now."""
    if isinstance(weight, RowStore):
        part = weight.kept()
        return KeptWeight((part,)) if part is not None and _in_memory(part.tensors) else None
    parts = weight.packed_parts() if isinstance(weight, SplitWeight) else [weight]
    found = [part for one in parts for part in _part(one)]
    return KeptWeight(tuple(found)) if len(found) == len(parts) else None


def _part(weight: PackedWeight) -> Iterator[KeptPart]:
    p, layout = weight.packed, weight.kernel.layout
    if layout is not None and _in_memory(p.tensors):
        yield KeptPart(replace(p.spec, act=weight.stored_act), p.n, p.k, p.experts, layout, p.tensors)


def _in_memory(tensors: Mapping[str, Tensor]) -> bool:
    return all(t.device.type == "cpu" for t in tensors.values())


def _nbytes(weight: KeptWeight) -> int:
    return sum(t.nbytes for part in weight.parts for t in part.tensors.values())
