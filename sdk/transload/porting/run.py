"""`port`: read a module, give it its new form, write it, forget it; then reopen the result and compare."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.checkpoint import open as open_checkpoint
from transload.errors import ConfigError, FormatError
from transload.formats.base import Json
from transload.formats.plain import Plain
from transload.porting.fingerprint import fingerprint
from transload.porting.plan import Action, Options, Output, PortPlan, Step, plan_port
from transload.porting.refusal import refused
from transload.porting.report import Moved, PortReport, engine_answers, words
from transload.porting.target import find_target
from transload.quant import ActSpec, QTensor, QuantSpec
from transload.requantize import Difference, difference, parse_spec
from transload.requantize import requantize as requantize_weight
from transload.rewrite import rewrite
from transload.writer import Writer

Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, what is being done
_FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_ACTIVATIONS: dict[str, tuple[ActSpec | None] | None] = {"keep": None, "int8": (ActSpec(),), "16bit": (None,)}
_QUANTIZATION = ("quantization_config", "compression_config")


def port(
    src: str | Path,
    dst: str | Path,
    to: str,
    *,
    requantize: str | QuantSpec | None = None,
    requantize_all: bool = False,
    floats: str = "fp32",
    activations: str = "keep",
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
) -> PortReport:
    """Writes the checkpoint at `src` to the folder `dst` for the target `to`, number for number.

    to: a format ("compressed-tensors", "fp32") or an engine ("vllm", "vllm-ascend==0.23"), whose format is chosen and
    whose limits count.

    requantize: a scheme ("int4-g128", see `requantize.parse_spec`) for modules that the format cannot hold exactly;
    requantize_all: for every quantized module. floats: dtype of quantized tensors that the target keeps in float
    (embeddings): fp32 is exact, bf16 and fp16 round and are reported. activations: "keep" the source's, or declare
    "int8" (dynamic, per token) or "16bit"; weights stay as they are. resume: continue a killed port of the same job.
    progress: called with bytes done, bytes in all, and the module at work.

    The folder appears when it is complete and has been read back and compared. Raises CannotHold, before anything is
    written, with every module that the format cannot hold; FormatError for a broken source; OutputExists.

        report = transload.port("model.gguf", "model-ct", to="compressed-tensors")
    """
    began = time.monotonic()
    if floats not in _FLOATS:
        raise ConfigError(f"floats '{floats}': give one of {', '.join(_FLOATS)}")
    if activations not in _ACTIVATIONS:
        raise ConfigError(f"activations '{activations}': give one of {', '.join(_ACTIVATIONS)}")
    spec = parse_spec(requantize) if isinstance(requantize, str) else requantize
    if requantize_all and spec is None:
        raise ConfigError("requantize_all without requantize: give the scheme, for example requantize='int4-g128'")
    target = find_target(to)
    source = open_checkpoint(src)
    plan = plan_port(source, target, Options(spec, requantize_all, _FLOATS[floats], _ACTIVATIONS[activations]))
    if plan.refusals:
        raise refused(source, plan)
    job = _Job(source, plan, Path(dst), progress or (lambda done, total, what: None))
    identity = f"{source.path.resolve()} {_stamp(source)} {to} {plan.options}"
    with Writer(dst, plan.layout(), source=source.path, overwrite=overwrite, resume=resume, job=identity) as writer:
        job.write(writer)
        job.compare(writer.partial)
    return job.report(time.monotonic() - began)


class _Job:
    """One run of a plan: what was written, as fingerprints, and what it cost in error."""

    def __init__(self, source: Checkpoint, plan: PortPlan, target: Path, progress: Progress) -> None:
        self.source, self.plan, self.target, self.progress = source, plan, target, progress
        self.differences: dict[str, Difference | None] = {}
        self.written: dict[str, bytes] = {}  # fingerprint of every output
        self.files: tuple[str, ...] = ()
        self.total = 2 * sum(step.entry.stored_bytes for step in plan.steps)  # written, then compared
        self.done = 0

    def write(self, writer: Writer) -> None:
        """Weights first, then what lies beside them."""
        for step in self.plan.steps:
            self.progress(self.done, self.total, step.entry.name)
            self._write_step(writer, step)
            self.done += step.entry.stored_bytes
        self._write_files(writer)

    def compare(self, folder: Path) -> None:
        """Opens the result and compares names and every number with what was meant. Raises FormatError."""
        found = open_checkpoint(folder)
        meant = {o.name if o.action is not Action.DEQUANTIZE else f"{o.name}.weight" for o in self.plan.outputs()}
        if meant != found.entries.keys():
            odd = sorted(meant ^ found.entries.keys())
            raise FormatError(f"{folder}: the result has other entries than were written: {', '.join(odd[:3])}")
        for step in self.plan.steps:
            self.progress(self.done, self.total, f"comparing {step.entry.name}")
            for output in step.outputs:
                entry = found.entry(output.name)
                value = found.read(entry) if entry.spec is None else found.decode(entry)
                if fingerprint(value) != self.written[output.name]:
                    raise FormatError(f"{folder}: {output.name} read back differs from what was written")
            self.done += step.entry.stored_bytes
        self.progress(self.total, self.total, "done")

    def report(self, seconds: float) -> PortReport:
        """The report of a finished run."""
        moved, carried = [], 0
        for step in self.plan.steps:
            if step.entry.spec is None:
                carried += len(step.outputs)
                continue
            share = step.entry.stored_bytes // len(step.outputs)
            moved += [
                Moved(o.name, str(step.entry.spec), words(o), o.action.value, self.differences[o.name], share, o.nbytes)
                for o in step.outputs
            ]
        return PortReport(
            source=str(self.source.path),
            target=str(self.target),
            source_format=self.source.format.name,
            target_format=self.plan.format.name,
            modules=tuple(moved),
            carried=carried,
            files=self.files,
            bytes_before=sum(step.entry.stored_bytes for step in self.plan.steps),
            bytes_after=sum(output.nbytes for output in self.plan.outputs()),
            seconds=seconds,
            engines=engine_answers(self.plan, self.target),
            notes=tuple(self._notes()),
        )

    def _write_step(self, writer: Writer, step: Step) -> None:
        for output, value in zip(step.outputs, _values(self.source, step), strict=True):
            new, self.differences[output.name] = _moved(value, output, self.plan.options)
            self.written[output.name] = fingerprint(new)
            if isinstance(new, Tensor):
                writer.add(next(iter(output.tensors)), new)
                continue
            for name, tensor in self.plan.format.encode(output.name, new).items():
                writer.add(name, tensor)

    def _write_files(self, writer: Writer) -> None:
        specs = {o.name: o.spec for o in self.plan.outputs() if o.spec is not None}
        floats = dict(_float_linears(self.plan))
        carried = [name for o in self.plan.outputs() if o.spec is None for name in o.tensors]
        extra = dict(self.plan.format.finish(specs, floats))
        extra |= self.plan.format.describe(specs, carried)
        config = _config(self.source.config, self.plan) | extra.pop("config.json", {})
        writer.add_json("config.json", config)
        names = ["config.json", *extra]
        for name, value in extra.items():
            writer.add_json(name, value)
        for name, data in self.source.format.files(self.source.source).items():
            writer.add_bytes(name, data)
            names.append(name)
        for file in self.source.carried_files():
            if file.name not in names:
                writer.carry(file)
                names.append(file.name)
        self.files = tuple(names)

    def _notes(self) -> Iterator[str]:
        code = [file.name for file in self.source.custom_code()]
        if code:
            yield f"code beside the weights was not copied: {', '.join(code)}"
        rounded = [o.name for o in self.plan.outputs() if o.action is Action.DEQUANTIZE]
        if rounded and not isinstance(self.plan.format, Plain):
            dtype = str(self.plan.options.floats).removeprefix("torch.")
            yield f"{dtype} in the target, which keeps them in float: {', '.join(rounded[:8])}"


def _moved(value: QTensor | Tensor, output: Output, options: Options) -> tuple[QTensor | Tensor, Difference | None]:
    """A module or tensor in its new form, and how far it moved (None: not at all)."""
    if isinstance(value, Tensor):
        return value, None
    if output.action is Action.REQUANTIZE:
        assert output.spec is not None
        assert options.requantize is not None
        rounded = replace(options.requantize, scale_dtype=output.spec.scale_dtype)
        new, apart = requantize_weight(value, rounded)
        return rewrite(new, output.spec), apart
    if output.action is Action.DEQUANTIZE:
        dtype = next(iter(output.tensors.values()))[0]
        weight = _as_floats(value, dtype)
        if dtype is torch.float32:
            return weight, None
        apart = difference(value, weight)
        return weight, apart if apart.max_error else None
    assert output.spec is not None
    return rewrite(value, output.spec), None


def _as_floats(w: QTensor, dtype: torch.dtype) -> Tensor:
    """[N, K] in slabs of rows, so that the float32 form of a large table never exists whole beside the result."""
    weight = torch.empty(w.n, w.k, dtype=dtype)
    step = max(1, (1 << 22) // max(w.k, 1))
    for start in range(0, w.n, step):
        weight[start : start + step] = w.rows(start, min(start + step, w.n)).dequantize()
    return weight


def _values(source: Checkpoint, step: Step) -> Iterator[QTensor | Tensor]:
    """What the outputs of a step are made of, one in memory at a time."""
    entry = step.entry
    if step.outputs and step.outputs[0].expert is not None:
        yield from source.experts(entry)
    else:
        yield source.read(entry) if entry.spec is None else source.decode(entry)


def _float_linears(plan: PortPlan) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Modules whose weight is a float matrix, embeddings apart: formats list them as not quantized."""
    for output in plan.outputs():
        for name, (_, shape) in output.tensors.items() if output.spec is None else ():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and len(shape) == 2 and "emb" not in module.rpartition(".")[2]:
                yield module, shape


def _config(config: Mapping[str, object], plan: PortPlan) -> Json:
    """config.json without the source's quantization, with the dtype that engines should compute in."""
    clean = {key: value for key, value in config.items() if key not in _QUANTIZATION}
    inner = clean.get("text_config")
    if isinstance(inner, dict):
        clean["text_config"] = {key: value for key, value in inner.items() if key not in _QUANTIZATION}
    if isinstance(plan.format, Plain):
        clean.pop("torch_dtype", None)
        clean["dtype"] = str(plan.format.dtype).removeprefix("torch.")
    elif "dtype" not in clean and "torch_dtype" not in clean:
        clean["dtype"] = "bfloat16"
    return clean


def _stamp(source: Checkpoint) -> str:
    """Sizes and times of the source's files: a resumed port must read what the first run read."""
    files = sorted({info.file for info in source.source.infos.values()})
    return " ".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
