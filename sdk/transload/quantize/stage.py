"""The folder where a quantized model grows: one file a layer, in Transload's own format, and what a resumed run needs.

A layer's file appears when it is complete, so a run that was killed goes on with the first layer that has none. When
all are there the folder is a checkpoint like any other, which `port` brings to its target.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.errors import ConfigError, OutputExists
from transload.formats.neutral import Neutral
from transload.quant import QTensor, QuantSpec
from transload.quantize.hidden import Hidden
from transload.quantize.layerwise import Made

_JOB = "quantize.json"
_REPORT = "transload.quantize"
_FILE_BYTES = 512 << 20  # floats outside of layers are saved in files of about this size


class Stage:
    """The folder `<out>.quantizing`. job: what was asked for; a resumed run must ask for the same."""

    def __init__(self, out: Path, job: Mapping[str, object], resume: bool, overwrite: bool) -> None:
        self.folder = out.with_name(out.name + ".quantizing")
        self._specs: dict[str, QuantSpec] = {}
        described = json.dumps(job, sort_keys=True)
        there = self.folder / _JOB
        if self.folder.exists() and not (resume or overwrite):
            raise OutputExists(f"{self.folder}: is left from an unfinished run; resume it or delete it")
        if self.folder.exists() and resume and there.is_file():
            if there.read_text(encoding="utf-8") != described:
                raise ConfigError(
                    f"{self.folder}: is left from another model, recipe or text; delete it to start again"
                )
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        there.write_text(described, encoding="utf-8")

    def has(self, part: str) -> bool:
        """Whether a part ("layer-0003") is complete."""
        return self._file(part).is_file()

    def save(self, part: str, modules: Mapping[str, QTensor], floats: Mapping[str, Tensor], made: Iterable[Made],
             notes: Iterable[str]) -> None:  # fmt: skip
        """Writes one part, and how it was made; it appears complete or not at all."""
        tensors = {n: t.contiguous() for n, t in floats.items()}
        for name, w in modules.items():
            tensors |= {n: t.contiguous() for n, t in Neutral().encode(name, w).items()}
        report = {"made": [asdict(m) for m in made], "notes": list(notes)}
        partial = self._file(part).with_suffix(".partial")
        save_file(tensors, partial, metadata={_REPORT: json.dumps(report)})
        with partial.open("rb") as f:
            os.fsync(f.fileno())
        partial.rename(self._file(part))

    def hidden(self, layer: int, shape: tuple[int, int, int], create: bool) -> Hidden:
        """The inputs of a layer: count, tokens, width."""
        return Hidden(self.folder / f"hidden-{layer:04d}.f32", *shape, create)

    def save_rest(
        self,
        checkpoint: Checkpoint,
        names: Iterable[str],
        changed: Mapping[str, Tensor],
        as_floats: Mapping[str, torch.dtype],
    ) -> None:
        """Copies entries, in files of bounded size; `changed` comes instead of what is stored.

        as_floats: quantized entries that become floats, and of which dtype.
        """
        for number, (modules, floats) in enumerate(_batches(checkpoint, names, changed, as_floats)):
            self.save(f"rest-{number:04d}", modules, floats, (), ())

    def report(self) -> tuple[list[Made], list[str]]:
        """How everything that is there was made."""
        made, notes = [], []
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as f:
                found = json.loads((f.metadata() or {}).get(_REPORT, "{}"))
            made += [Made(**m) for m in found.get("made", ())]
            notes += found.get("notes", [])
        return made, notes

    def finish(self, checkpoint: Checkpoint, specs: Mapping[str, QuantSpec], config: Mapping[str, object]) -> None:
        """Makes the folder a checkpoint: index, config.json and what lies beside the source's weights."""
        where: dict[str, str] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            with safe_open(file, "pt") as f:
                where |= dict.fromkeys(f.keys(), file.name)
        index = {"metadata": {}, "weight_map": where}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        merged = dict(config) | Neutral().finish(specs, {})["config.json"]
        (self.folder / "config.json").write_text(json.dumps(merged), encoding="utf-8")
        for name, data in checkpoint.contained_files().items():
            (self.folder / name).write_bytes(data)
        for path in checkpoint.carried_files():
            if not (self.folder / path.name).exists():
                shutil.copyfile(path, self.folder / path.name)

    def delete(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, part: str) -> Path:
        return self.folder / f"{part}.safetensors"


def _batches(
    checkpoint: Checkpoint,
    names: Iterable[str],
    changed: Mapping[str, Tensor],
    as_floats: Mapping[str, torch.dtype],
) -> Iterator[tuple[dict[str, QTensor], dict[str, Tensor]]]:
    modules: dict[str, QTensor] = {}
    floats: dict[str, Tensor] = {}
    size = 0
    for name in names:
        entry = checkpoint.entries.get(name)
        if name in changed or entry is None:
            floats[name] = changed[name]
            size += floats[name].nbytes
        elif entry.spec is None:
            floats[name] = checkpoint.read(entry)
            size += floats[name].nbytes
        elif name in as_floats:
            floats[f"{name}.weight"] = checkpoint.decode(entry).dequantize().to(as_floats[name])
            size += floats[f"{name}.weight"].nbytes
        else:
            modules[name] = checkpoint.decode(entry)
            size += modules[name].codes.nbytes
        if size >= _FILE_BYTES:
            yield modules, floats
            modules, floats, size = {}, {}, 0
    if modules or floats:
        yield modules, floats
