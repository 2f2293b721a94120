"""One run of a plan: weights streamed through, files beside them, everything read back and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from pathlib import Path

from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.checkpoint import open as open_checkpoint
from transload.errors import FormatError
from transload.formats.base import Json
from transload.formats.plain import Plain
from transload.porting.calibrated import left_out_notes
from transload.porting.fingerprint import fingerprint, stored_fingerprint
from transload.porting.moving import Value, encoded, moved, packed_values, values
from transload.porting.plan import Action, Output, PortPlan, Step
from transload.porting.report import Moved, PortReport, engine_answers, words
from transload.porting.stream import Ahead, Behind, Budget
from transload.quant import QTensor
from transload.requantize import Difference
from transload.writer import Writer

Progress = Callable[[int, int, str], None]
_IN_FLIGHT = 256 << 20  # bytes of modules at work besides the largest one
_QUANTIZATION = ("quantization_config", "compression_config")


class Job:
    """A port between its plan and its report."""

    def __init__(self, source: Checkpoint, plan: PortPlan, target: Path, progress: Progress) -> None:
        self.source, self.plan, self.target, self._progress = source, plan, target, progress
        self._differences: dict[str, Difference | None] = {}
        self._written: dict[str, bytes] = {}  # fingerprint of every stored tensor
        self._files: tuple[str, ...] = ()
        self._read_bytes = sum(step.entry.stored_bytes for step in plan.steps)
        self._made_bytes = sum(output.nbytes for output in plan.outputs())
        self._done = 0

    def write(self, writer: Writer) -> None:
        """Weights, then what lies beside them."""
        budget = Budget(_IN_FLIGHT)
        with Behind(budget.close) as behind, Ahead(self._decoded(budget), budget) as decoded:
            for output, value, share in decoded:
                self._tell(output.name)
                new, self._differences[output.name] = moved(value, output)
                tensors = encoded(new, output, self.plan.format)
                behind.submit(partial(self._store, writer, tensors, partial(budget.release, _cost(output))))
                self._done += share
                del value, new, tensors  # not kept while the next module is made
        self._write_files(writer)

    def compare(self, folder: Path) -> None:
        """Reads the result back: its names, every byte of every tensor, and one module of each kind decoded.

        Raises FormatError when anything differs from what was meant.
        """
        found = open_checkpoint(folder)
        meant = {o.name if o.action is not Action.DEQUANTIZE else f"{o.name}.weight" for o in self.plan.outputs()}
        if meant != found.entries.keys():
            odd = sorted(meant ^ found.entries.keys())
            raise FormatError(f"{folder}: the result has other entries than were written: {', '.join(odd[:3])}")
        infos = found.source.infos
        with ThreadPoolExecutor(2, thread_name_prefix="transload-compare") as pool:
            digests = pool.map(stored_fingerprint, (infos[name] for name in self._written))
            for (name, digest), stored in zip(self._written.items(), digests, strict=True):
                if digest != stored:
                    raise FormatError(f"{folder}: {name} read back differs from what was written")
                self._done += infos[name].nbytes
                self._tell(f"comparing {name}")
        for step, output, value in self._one_of_each_kind():
            self._compare_decoded(found, step, output, value)
        self._progress(self._done, self._done, "done")

    def report(self, seconds: float) -> PortReport:
        """The report of a finished run."""
        changed = [(step, o) for step in self.plan.steps for o in step.outputs if step.entry.spec or o.spec]
        return PortReport(
            source=str(self.source.path),
            target=str(self.target),
            source_format=self.source.format.name,
            target_format=self.plan.format.name,
            modules=tuple(
                Moved(
                    o.name,
                    str(step.entry.spec or step.entry.dtype),
                    words(o),
                    o.action.value,
                    self._differences[o.name],
                    step.entry.stored_bytes // len(step.outputs),
                    o.nbytes,
                )
                for step, o in changed
            ),
            carried=sum(o.action is Action.COPY for o in self.plan.outputs()),
            files=self._files,
            bytes_before=self._read_bytes,
            bytes_after=self._made_bytes,
            seconds=seconds,
            engines=engine_answers(self.plan, self.target),
            notes=tuple(self._notes()),
        )

    def _tell(self, what: str) -> None:
        self._progress(self._done, self._read_bytes + self._made_bytes, what)

    def _decoded(self, budget: Budget) -> Iterator[tuple[Output, Value, int]]:
        """Every output with what it is made of and its share of the bytes that are read."""
        for step in self.plan.steps:
            source = packed_values(self.source, step)
            for output in step.outputs:
                if not budget.acquire(_cost(output)):
                    return
                yield output, next(source), step.entry.stored_bytes // len(step.outputs)

    def _store(self, writer: Writer, tensors: Mapping[str, Tensor], done: Callable[[], None]) -> None:
        for name, tensor in tensors.items():
            self._written[name] = fingerprint(tensor)
            writer.add(name, tensor)
        done()

    def _one_of_each_kind(self) -> Iterator[tuple[Step, Output, Value]]:
        """The smallest module of every pair of source scheme and target scheme, made once more.

        Floats are left out: their bytes are their numbers.
        """
        kinds: dict[object, tuple[Step, Output]] = {}
        for step in self.plan.steps:
            output = step.outputs[0]
            kind = (step.entry.spec, output.spec, output.action)
            if output.spec is not None and (kind not in kinds or output.nbytes < kinds[kind][1].nbytes):
                kinds[kind] = step, output
        for step, output in kinds.values():
            yield step, output, moved(next(values(self.source, step)), output)[0]

    def _compare_decoded(self, found: Checkpoint, step: Step, output: Output, meant: Value) -> None:
        value = found[output.name]
        same = isinstance(value, QTensor) and isinstance(meant, QTensor) and _same_numbers(value, meant)
        if not same:
            raise FormatError(f"{found.path}: {output.name} ({step.entry.spec}) does not decode to what was meant")

    def _write_files(self, writer: Writer) -> None:
        specs = {o.name: o.spec for o in self.plan.outputs() if o.spec is not None}
        carried = [name for o in self.plan.outputs() if o.spec is None for name in o.tensors]
        extra = dict(self.plan.format.finish(specs, dict(_float_linears(self.plan))))
        extra |= self.plan.format.describe(specs, carried)
        writer.add_json("config.json", _config(self.source.config, self.plan) | extra.pop("config.json", {}))
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
        self._files = tuple(names)

    def _notes(self) -> Iterator[str]:
        yield from self.source.notes()
        code = [file.name for file in self.source.custom_code()]
        if code:
            yield f"code beside the weights was not copied: {', '.join(code)}"
        yield from left_out_notes(self.plan)
        rounded = [o.name for o in self.plan.outputs() if o.action is Action.DEQUANTIZE]
        if rounded and not isinstance(self.plan.format, Plain):
            dtype = str(self.plan.options.floats).removeprefix("torch.")
            yield f"{dtype} in the target, which keeps them in float: {', '.join(rounded[:8])}"


def _same_numbers(a: QTensor, b: QTensor) -> bool:
    """Equal parts; a zero point that is written out and the same one left implicit are equal too."""
    pairs = (
        (a.codes, b.codes),
        (a.scales, b.scales),
        (a.zero_points(), b.zero_points()),
        (a.mins, b.mins),
        (a.g_idx, b.g_idx),
    )
    return a.spec.grid is b.spec.grid and all(
        x is y or (x is not None and y is not None and x.equal(y)) for x, y in pairs
    )


def _cost(output: Output) -> int:
    """Bytes of an output while it is at work: a code per value, the tensors made of them, and as much again."""
    largest = max((prod(shape) for _, shape in output.tensors.values()), default=0)
    return 2 * (output.nbytes + largest)


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
