"""One run of a plan: weights streamed through, files beside them, everything read back and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from math import prod

from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.checkpoint import open as open_checkpoint
from transload.errors import FormatError
from transload.formats.plain import Plain
from transload.headers import TensorInfo
from transload.porting.calibrated import calibrated_tensors, left_out_notes
from transload.porting.container import Container
from transload.porting.fingerprint import fingerprint, stored_fingerprint
from transload.porting.moving import Value, encoded, experts_of, moved, packed_values, together, values
from transload.porting.notes import plan_notes
from transload.porting.plan import Action, Output, Step
from transload.porting.precision import executions
from transload.porting.report import Moved, PortReport, engine_answers, words
from transload.porting.stream import Ahead, Behind, Budget
from transload.porting.verify import Place, Reader, places
from transload.quant import QTensor
from transload.requantize import Difference
from transload.writer import Slot, Writer

Progress = Callable[[int, int, str], None]
_IN_FLIGHT = 256 << 20  # bytes of modules at work besides the largest one


class Job:
    """A port between its plan and its report."""

    def __init__(self, container: Container, progress: Progress) -> None:
        self.container, self._progress = container, progress
        self.source, self.plan = container.source, container.plan
        self._differences: dict[str, list[Difference | None]] = {}  # several for a stack that stays one tensor
        self._written: dict[str, bytes] = {}  # fingerprint of every stored tensor
        self._files: tuple[str, ...] = ()
        self._read_bytes = sum(step.entry.stored_bytes for step in self.plan.steps)
        self._made_bytes = sum(output.nbytes for output in self.plan.outputs())
        self._done = 0

    def write(self, writer: Writer) -> None:
        """Weights, then what lies beside them."""
        budget = Budget(_IN_FLIGHT)
        with Behind(budget.close) as behind, Ahead(self._decoded(budget), budget) as decoded:
            for output, expert, value, share, cost in decoded:
                self._tell(output.name)
                new, apart = moved(value, output)
                self._differences.setdefault(output.name, []).append(apart)
                tensors = encoded(new, output, self.plan.format)
                tensors |= calibrated_tensors(new, output, self.plan, self.source)
                behind.submit(partial(self._store, writer, tensors, expert, partial(budget.release, cost)))
                self._done += share
                del value, new, tensors  # not kept while the next module is made
        for name, tensor in self.container.extras().items():
            self._add(writer, name, tensor)
        self._files = self.container.write_files(writer)

    def compare(self, writer: Writer) -> None:
        """Reads the result back: its names, every byte of every tensor, and one module of each kind decoded.

        Raises FormatError when anything differs from what was meant.
        """
        found = open_checkpoint(self.container.opened(writer.partial))
        there = self._compare_names(found)
        infos = found.source.infos
        stored = [_part_of(infos, writer.layout.slots[name]) for name in self._written]
        with ThreadPoolExecutor(2, thread_name_prefix="transload-compare") as pool:
            digests = pool.map(stored_fingerprint, stored)
            for (name, digest), read, info in zip(self._written.items(), digests, stored, strict=True):
                if digest != read:
                    raise FormatError(f"{found.path}: {name} read back differs from what was written")
                self._done += info.nbytes
                self._tell(f"comparing {name}")
        read_back = Reader(found)
        for step, output, value in self._one_of_each_kind():
            entry, expert = there[_full_name(output)]
            first = 0 if experts_of(step) else expert
            self._compare_decoded(found, read_back((entry, first)), step, output, value)
        self._progress(self._done, self._done, "done")

    def report(self, seconds: float) -> PortReport:
        """The report of a finished run."""
        changed = [(step, o) for step in self.plan.steps for o in step.outputs if step.entry.spec or o.spec]
        return PortReport(
            source=str(self.source.path),
            target=str(self.container.target),
            source_format=self.source.format.name,
            target_format=self.plan.format.name,
            modules=tuple(
                Moved(
                    o.name,
                    str(step.entry.spec or step.entry.dtype),
                    words(o),
                    o.action.value,
                    together(self._differences[o.name]),
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
            engines=engine_answers(self.plan, self.container.result()),
            notes=(*self._notes(), *plan_notes(self.plan, {n: together(d) for n, d in self._differences.items()})),
            executed=executions(self.plan),
        )

    def _tell(self, what: str) -> None:
        self._progress(self._done, self._read_bytes + self._made_bytes, what)

    def _decoded(self, budget: Budget) -> Iterator[tuple[Output, int | None, Value, int, int]]:
        """Every output, or every expert of one, with what it is made of, its share of the bytes read, and its cost."""
        for step in self.plan.steps:
            source, count = packed_values(self.source, step), experts_of(step)
            experts = range(count) if count else (None,)
            for output, expert in product(step.outputs, experts):
                cost = _cost(output) // len(experts)
                if not budget.acquire(cost):
                    return
                yield output, expert, next(source), step.entry.stored_bytes // len(step.outputs) // len(experts), cost

    def _store(
        self, writer: Writer, tensors: Mapping[str, Tensor], expert: int | None, done: Callable[[], None]
    ) -> None:
        for name, tensor in tensors.items():
            stored = self.container.stored(name, tensor)
            if expert is None:
                self._add(writer, name, stored)
            elif tensor.numel():
                self._add(writer, f"{name}[{expert}]", stored)
            elif expert == 0:  # a marker without data, whose shape counts the experts
                self._add(writer, name, stored.new_empty(writer.layout.slots[name].shape))
        done()

    def _add(self, writer: Writer, name: str, tensor: Tensor) -> None:
        self._written[name] = fingerprint(tensor)
        writer.add(name, tensor)

    def _compare_names(self, found: Checkpoint) -> dict[str, Place]:
        """Where every output is in the result: an entry of its own, or an expert of a stack."""
        meant = {_full_name(output) for output in self.plan.outputs()}
        whole = {e.name if e.spec is None else f"{e.name}.weight": e.name for e in found.entries.values()}
        there: dict[str, Place] = {full: (name, None) for full, name in whole.items() if full in meant}
        taken = {name for name, _ in there.values()}
        there |= {full: place for full, place in places(found).items() if place[0] not in taken}
        if meant != there.keys():
            odd = sorted(meant ^ there.keys())
            raise FormatError(f"{found.path}: the result has other entries than were written: {', '.join(odd[:3])}")
        return there

    def _one_of_each_kind(self) -> Iterator[tuple[Step, Output, Value]]:
        """The smallest module of every pair of source scheme and target scheme, made once more.

        Floats are left out, unless the container stores them differently: their bytes are their numbers.
        """
        kinds: dict[object, tuple[Step, Output]] = {}
        for step in self.plan.steps:
            output = step.outputs[0]
            differently = self.container.rearranged(_full_name(output))
            kind = (step.entry.spec, output.spec, output.action, differently)
            plain = output.spec is None and not differently
            if not plain and (kind not in kinds or output.nbytes < kinds[kind][1].nbytes):
                kinds[kind] = step, output
        for step, output in kinds.values():
            yield step, output, moved(next(values(self.source, step)), output)[0]

    def _compare_decoded(
        self, found: Checkpoint, value: QTensor | Tensor, step: Step, output: Output, meant: Value
    ) -> None:
        if isinstance(value, Tensor) and isinstance(meant, Tensor):
            same = value.shape == meant.shape and bool((value == meant).all())
        else:
            same = isinstance(value, QTensor) and isinstance(meant, QTensor) and _same_numbers(value, meant)
        if not same:
            raise FormatError(f"{found.path}: {output.name} ({step.entry.spec}) does not decode to what was meant")

    def _notes(self) -> Iterator[str]:
        yield from self.container.notes()
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


def _full_name(output: Output) -> str:
    """The name of the output's tensor as a float, which tells modules apart in every container."""
    return next(iter(output.tensors)) if output.spec is None else f"{output.name}.weight"


def _part_of(infos: Mapping[str, TensorInfo], slot: Slot) -> TensorInfo:
    """Where the headers of the result say that a slot's bytes are."""
    start = infos[slot.tensor].start + slot.offset
    return replace(infos[slot.tensor], start=start, end=start + slot.nbytes)
