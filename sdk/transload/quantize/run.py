"""`quantize`: a float checkpoint, layer by layer, into any target that `port` writes."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.checkpoint import open as open_checkpoint
from transload.errors import ConfigError, FormatError
from transload.porting import port
from transload.porting.run import FLOATS
from transload.quant import QTensor
from transload.quantize.assign import Assignment, assign, layer_count, layer_of
from transload.quantize.device import back, find_device, move, move_arguments, through
from transload.quantize.held import Filled
from transload.quantize.hidden import Hidden
from transload.quantize.imported import find_recipe
from transload.quantize.layerwise import SAME, Forward, LayerJob, LayerResult, Made, sqnr
from transload.quantize.recipe import Recipe
from transload.quantize.report import QuantizeReport, left_notes
from transload.quantize.rotate import Rotation
from transload.quantize.rtn import quantize_mse
from transload.quantize.skeleton import Skeleton, forward
from transload.quantize.stage import Stage
from transload.quantize.static import INPUT_SCALE, StaticInputs
from transload.quantize.targets import check_target, left_in_float
from transload.quantize.text import windows
from transload.requantize import requantize
from transload.runtime import tokenizer as tokenizer_of
from transload.writer.place import check_apart, check_free, named

Progress = Callable[[int, int, str], None]  # layers done, layers in all, what is being done
_PROBE = 8  # tokens of a window that only checks
_QUANTIZATION = ("quantization_config", "compression_config")


def quantize(
    model: str | Path,
    out: str | Path,
    recipe: str | Path | Recipe = "int4-g128",
    *,
    to: str = "compressed-tensors",
    calibration: str | Path | None = None,
    floats: str = "bf16",
    tokenizer: Any = None,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> QuantizeReport:
    """Quantizes the checkpoint at `model` by a recipe and writes the folder `out` for the target `to`.

    recipe: a name that `transload recipes` lists, a YAML file, a configuration of llm-compressor or GPTQModel
    (`imported`), or a Recipe. to: a format or an engine, as for `port`.
    calibration: a text or .jsonl file, None for the built-in sample. floats: dtype of embeddings and heads that are
    quantized in the source. tokenizer: where the model brings none. device: where layers are calibrated, "cpu" or what
    torch calls an accelerator ("cuda"). resume: continue a run that was killed.

    Quantized sources (GGUF, FP8 blocks) are read through their formats. `out` appears when it is complete and has been
    read back. Raises, before any work, ConfigError for a recipe that names no module or text that is too short,
    CannotHold for schemes that the target refuses; and FormatError or ConfigError, leaving nothing, for weights or
    activations that are not finite.

        report = transload.quantize("Qwen3-8B", "Qwen3-8B-int4", "int4-g128", to="vllm")
    """
    began = time.monotonic()
    if floats not in FLOATS:
        raise ConfigError(f"floats '{floats}': give one of {', '.join(FLOATS)}")
    found, place = find_recipe(recipe), find_device(device)
    chosen = found.recipe
    source = open_checkpoint(model, "native")
    target = named(Path(out))
    check_apart(target, source.path)
    check_free(target, overwrite)
    assignment = assign(chosen, source, layer_count(source.config))
    left = left_in_float(source, assignment, check_target(source, assignment, to))
    ids, text = None, "no text needed"
    if chosen.calibrated:
        ids, text = windows(calibration, chosen.calibration, tokenizer or tokenizer_of(source.path))
    job = {
        "source": _stamp(source),
        "recipe": chosen.model_dump(mode="json"),
        "text": "" if ids is None else hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
    }
    stage = Stage(target, job, resume, overwrite)
    kept = dict.fromkeys(left, FLOATS[floats])
    run = _Run(source, chosen, assignment, stage, ids, kept, place, progress or (lambda done, total, what: None))
    try:
        run.quantize()
        seconds = time.monotonic() - began
        made, notes = stage.report()
        if resume:  # what a port was at when the earlier run was killed
            shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
        written = port(stage.folder, target, to, floats=floats, overwrite=overwrite)
    except BaseException:
        if not resume:
            stage.delete()
        raise
    stage.delete()
    written = replace(written, source=str(source.path), source_format=source.format.name)
    return QuantizeReport(
        chosen.name,
        text,
        tuple(made),
        (*found.notes, *source.notes(), *assignment.notes, *left_notes(left, floats), *notes),
        written,
        seconds,
    )


class _Run:
    """The work of one call, between its checks and the port."""

    def __init__(
        self,
        source: Checkpoint,
        recipe: Recipe,
        assignment: Assignment,
        stage: Stage,
        ids: Tensor | None,
        as_floats: Mapping[str, torch.dtype],
        device: torch.device,
        progress: Progress,
    ) -> None:
        self.source, self.recipe, self.assignment, self.stage = source, recipe, assignment, stage
        self.ids, self._as_floats, self._device, self._progress = ids, as_floats, device, progress
        self._by_layer: dict[int, list[str]] = {}
        self._outside: list[str] = []
        for name in source.entries:
            layer = layer_of(name)
            self._outside.append(name) if layer is None else self._by_layer.setdefault(layer, []).append(name)
        self._config: dict[str, object] = {k: v for k, v in source.config.items() if k not in _QUANTIZATION}

    @torch.no_grad()
    def quantize(self) -> None:
        """Every layer, then the rest; the stage is a checkpoint afterwards."""
        changed: dict[str, Tensor] = {}
        if self.recipe.calibrated or self.recipe.rotate:
            changed = self._through_the_model()
        for layer, names in sorted(self._by_layer.items()):
            if not self.stage.has(_part(layer)):
                self._progress(layer, len(self._by_layer), f"layer {layer}")
                self._save(_part(layer), names, self._rounded(names))
        if not self.stage.has("outside"):
            self._save("outside", [], self._rounded(self._outside))
        replaced = {name.removesuffix(".weight") for name in changed}  # heads and embeddings that are quantized too
        left = [name for name in self._outside if not self._taken(name) and name not in replaced]
        names = [*left, *(n for n in changed if n not in self.source.entries)]
        self.stage.save_rest(self.source, names, changed, self._as_floats)
        specs = {n: a.spec for n, a in self.assignment.modules.items()}
        kept = {
            n: e.spec
            for n, e in self.source.entries.items()
            if e.spec is not None and not self._taken(n) and n not in replaced and n not in self._as_floats
        }
        self.stage.finish(self.source, kept | specs, self._config)

    def _through_the_model(self) -> dict[str, Tensor]:
        """The decoder layers, through transformers' code; returns changed tensors outside of them."""
        skeleton = Skeleton(self.source)
        if len([n for n in self._by_layer if n < skeleton.layers]) != skeleton.layers:
            raise FormatError(f"{self.source.path}: has tensors of {len(self._by_layer)} layers, not {skeleton.layers}")
        turn = self._rotation(skeleton)
        first = next(i for i in range(skeleton.layers + 1) if i == skeleton.layers or not self.stage.has(_part(i)))
        hidden = None
        arguments: list[dict[str, Any]] = [{}] * skeleton.layers
        if first < skeleton.layers:
            arguments = skeleton.arguments(_PROBE if self.ids is None else self.ids.shape[1])
        if self.ids is not None and first < skeleton.layers:
            hidden = self._inputs(skeleton, turn, first)
        for index in range(first, skeleton.layers):
            self._progress(index, skeleton.layers, f"layer {index}")
            hidden = self._layer(skeleton, index, arguments[index], hidden, turn)
        self._progress(skeleton.layers, skeleton.layers, "writing")
        return {} if turn is None else self._turned_ends(skeleton, turn)

    def _inputs(self, skeleton: Skeleton, turn: Rotation | None, first: int) -> Hidden:
        """The hidden states before layer `first`: of an earlier run, or the embedded text."""
        assert self.ids is not None
        count, tokens = self.ids.shape
        width = int(skeleton.embedded(self.ids[:1, :1]).shape[-1])
        if first:
            return self.stage.hidden(first, (count, tokens, width), create=False)
        hidden = self.stage.hidden(0, (count, tokens, width), create=True)
        for start in range(0, count, 64):
            rows = skeleton.embedded(self.ids[start : start + 64])
            hidden[slice(start, start + len(rows))] = rows if turn is None else turn.rows(rows)
        return hidden

    def _layer(
        self, skeleton: Skeleton, index: int, arguments: dict[str, Any], hidden: Hidden | None, turn: Rotation | None
    ) -> Hidden | None:
        filled = skeleton.layer(index)
        work = LayerJob(f"layer {index}", filled, self.recipe, self.assignment.modules)
        work.check_weights()
        run = forward(filled.layer, arguments)
        changed = {} if turn is None else self._rotated(turn, filled, run, hidden, work.label)
        last = index + 1 == skeleton.layers
        inputs: StaticInputs | None = None
        out: Hidden | None = None
        if hidden is not None:
            inputs = StaticInputs(work.label, filled, self.assignment.modules, hidden.count, hidden.tokens)
            if inputs or not last:
                out = self.stage.hidden(index + 1, (hidden.count, hidden.tokens, hidden.width), create=True)
        move(filled, self._device)
        run = through(forward(filled.layer, move_arguments(arguments, self._device)), self._device)
        with torch.device(self._device):
            result = work.quantize(run, hidden)
            if hidden is not None and out is not None and inputs is not None:
                inputs.watch()
                work.advance(run, hidden, out)
        result.modules = {name: back(w) for name, w in result.modules.items()}
        scales = {} if inputs is None or out is None else inputs.scales()
        if last and out is not None:
            out.delete()
        stored = dict(skeleton.layer_parameters(index))
        floats = {stored[n]: t.to("cpu", filled.dtypes[n]) for n, t in (changed | result.floats).items()}
        floats |= {f"{n}.weight": t.cpu() for n, t in result.weights.items()}
        floats |= {f"{n}.{INPUT_SCALE}": t for n, t in scales.items()}
        self._save(_part(index), self._by_layer[index], result, floats)
        if hidden is not None:
            hidden.delete()
        return out

    def _rotated(
        self, turn: Rotation, filled: Filled, run: Forward, hidden: Hidden | None, label: str
    ) -> dict[str, Tensor]:
        """Rotates a layer, and checks on one window that it computes the same, rotated."""
        width = turn.width
        generator = torch.Generator().manual_seed(0)
        window = torch.randn(1, _PROBE, width, generator=generator) if hidden is None else hidden[slice(0, 1)]
        before = run(turn.back(window))
        changed = turn.layer(filled)
        apart = float((run(window) - turn.rows(before)).norm() / (before - turn.back(window)).norm().clamp(min=1e-30))
        if not apart < SAME:
            raise ConfigError(f"{label}: rotation changes the layer by {apart:.1e}: it does not fit this architecture")
        return changed

    def _save(
        self, part: str, names: list[str], result: LayerResult, changed: Mapping[str, Tensor] | None = None
    ) -> None:
        """One part of the stage: quantized modules, and every other entry of it as it is or as it became."""
        modules, floats = dict(result.modules), dict(changed or {})
        for name in names:
            if name in floats or self._taken(name):
                continue
            entry = self.source.entries[name]
            if entry.spec is None:
                floats[name] = self.source.read(entry)
            elif f"{name}.weight" not in floats and name in self._as_floats:
                floats[f"{name}.weight"] = self.source.decode(entry).dequantize().to(self._as_floats[name])
            elif f"{name}.weight" not in floats:
                modules[name] = self.source.decode(entry)
        self.stage.save(part, modules, floats, result.made, result.notes)

    def _taken(self, entry: str) -> bool:
        """Whether an entry of the source, or the experts in it, are among the quantized modules."""
        module = entry.removesuffix(".weight")
        head, dot, last = module.rpartition(".experts.")
        return module in self.assignment.modules or (
            bool(dot) and f"{head}.experts.0.{last}" in self.assignment.modules
        )

    def _rounded(self, names: list[str]) -> LayerResult:
        """Modules rounded without any text."""
        result = LayerResult()
        for name in names:
            if not self._taken(name):
                continue
            entry = self.source.entries[name]
            module = name.removesuffix(".weight")
            if module in self.assignment.modules:
                whole = self.source.read(entry) if entry.spec is None else self.source.decode(entry)
                self._round(module, whole, result)
                continue
            head, _, last = module.rpartition(".experts.")
            for e, expert in enumerate(self.source.experts(entry)):
                self._round(f"{head}.experts.{e}.{last}", expert, result)
        return result

    def _round(self, module: str, value: QTensor | Tensor, result: LayerResult) -> None:
        assigned = self.assignment.modules[module]
        weight = value.dequantize() if isinstance(value, QTensor) else value.float()
        if not bool(torch.isfinite(weight).all()):
            raise FormatError(f"{self.source.path}: {module} contains NaN or infinity")
        spec = assigned.spec
        made = requantize(weight, spec)[0] if assigned.method == "rtn" else quantize_mse(weight, spec)  # both in slabs
        note = assigned.note
        if assigned.method not in ("rtn", "mse"):
            note = "; ".join(n for n in (note, "not in a decoder layer: rounded to nearest") if n)
        label = assigned.method if assigned.method in ("rtn", "mse") else "rtn"
        quality = sqnr(weight, made)
        result.modules[module] = made
        result.made.append(Made(module, str(assigned.spec), label, 0, quality, None, note))

    def _rotation(self, skeleton: Skeleton) -> Rotation | None:
        if not self.recipe.rotate:
            return None
        if skeleton.unused:
            raise ConfigError(
                f"recipe '{self.recipe.name}' rotates, but {skeleton.unused[0]} and {len(skeleton.unused) - 1} more "
                "stored modules are not in the model's code and would not be rotated with it"
            )
        width = int(skeleton.embedded(torch.zeros(1, 1, dtype=torch.int64)).shape[-1])
        turn = Rotation(width, self.recipe.calibration.seed)
        self.assignment.notes.append(turn.note)
        return turn

    def _turned_ends(self, skeleton: Skeleton, turn: Rotation) -> dict[str, Tensor]:
        """Embedding, last norm and head of a rotated model; a head that was tied gets a weight of its own."""
        ends = skeleton.ends
        embedding, norm = skeleton.floats(ends.embedding), skeleton.floats(ends.norm)
        gain = norm.float() + skeleton.norm_offset
        head = embedding if ends.head is None else skeleton.floats(ends.head)
        name = "lm_head.weight" if ends.head is None else skeleton.stored_name(ends.head)
        changed = {skeleton.stored_name(ends.norm): torch.full_like(norm, 1 - skeleton.norm_offset)}
        changed[name] = turn.head(head, gain).to(head.dtype)
        changed[skeleton.stored_name(ends.embedding)] = torch.cat(
            [turn.rows(p) for p in torch.split(embedding, 8192)]
        ).to(embedding.dtype)
        for fields in (self._config, self._config.get("text_config")):
            if isinstance(fields, dict) and "tie_word_embeddings" in fields:
                fields["tie_word_embeddings"] = False
        if ends.head is None:
            self._config["tie_word_embeddings"] = False
        return changed


def _part(layer: int) -> str:
    return f"layer-{layer:04d}"


def _stamp(source: Checkpoint) -> str:
    """Path, sizes and times of the source's files."""
    found = sorted({info.file for info in source.source.infos.values()})
    return json.dumps([str(source.path.resolve()), *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in found)])
