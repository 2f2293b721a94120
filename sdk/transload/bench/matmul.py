"""The matmul benchmark: one case after the other, every contender in turn, one row of results each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from transload.bench import peers
from transload.bench.cases import MatmulCase, Operands, operands, weight_of
from transload.bench.limits import Limits
from transload.bench.remote import ERROR_ROWS, Environment
from transload.bench.timing import Clock, Contender, Local, interleaved, ratio
from transload.hal import Backend, Device, Kernel, Packed, Problem, choose
from transload.quant import QTensor


@dataclass(frozen=True, slots=True)
class Row:
    """One case. us: median microseconds of the chosen kernel; peers: of the others; faster: ratio to each of them.

    rel_err and errors are relative to the float64 product of the dequantized weight with unquantized activations.
    read and peak are fractions of the measured limits: packed bytes over time, operations over time (int8
    or bf16). Weights that fit a cache are read faster than memory's limit.
    """

    n: int
    k: int
    m: int
    group: int
    scheme: str
    threads: int
    kernel: str
    us: float
    rel_err: float
    experts: int | None = None
    read: float | None = None
    peak: float | None = None
    peers: dict[str, float] = field(default_factory=dict)
    faster: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    schemes: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def best_peer(self) -> tuple[str, float] | None:
        """(name, how many times faster the chosen kernel is) of the fastest peer of the same scheme."""
        same = {name: f for name, f in self.faster.items() if self.schemes.get(name) == self.scheme}
        return min(same.items(), key=lambda item: item[1], default=None)

    def as_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Settings:
    """threads for everyone; rounds and seconds a turn; other Pythons whose libraries take part; limits, if measured."""

    threads: int = 1
    rounds: int = 7
    budget: float = 0.03
    with_peers: bool = True
    environments: tuple[Path, ...] = ()
    limits: Limits | None = None
    clock: Clock = "wall"


def run(backend: Backend, device: Device, cases: Sequence[MatmulCase], settings: Settings) -> Iterator[Row]:
    """Benchmarks case by case, yielding each row as it is done. Consecutive cases of one weight share its packing."""
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    weights = _Weights(backend, device)
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            others = [stack.enter_context(Environment(python)) for python in settings.environments]
            for case in cases:
                yield _one(case, weights, others, folder, settings)
    finally:
        torch.set_num_threads(before)


class _Weights:
    """The current weight, packed for every kernel that takes it."""

    def __init__(self, backend: Backend, device: Device) -> None:
        self.backend, self.device = backend, device
        self._key: tuple[object, ...] = ()
        self._weight: QTensor | None = None
        self._packed: dict[str, tuple[Kernel, Packed]] = {}

    def packed(self, case: MatmulCase) -> tuple[QTensor, dict[str, tuple[Kernel, Packed]], str]:
        """(weight, kernels with their packed weights, name of the chosen kernel)."""
        key = (case.n, case.k, case.group, case.experts, case.scheme)
        weight = self._weight
        if weight is None or key != self._key:
            self._packed = {}
            weight = self._weight = weight_of(case)
            self._key = key
        problem = Problem(case.n, case.k, case.spec, case.x_dtype, case.m, case.experts)
        chosen = choose(self.backend, problem, self.device).kernel
        place = partial(_placed, device=self.backend.torch_device(self.device))
        for kernel in self.backend.kernels:
            # Kernels of the chosen one's own module are variants of it, not rivals; the reference is slow on purpose.
            rival = type(kernel).__module__ != type(chosen).__module__ and kernel.name != "reference"
            if (
                (kernel is chosen or rival)
                and kernel.name not in self._packed
                and kernel.refuses(problem, self.device) is None
            ):
                self._packed[kernel.name] = (kernel, place(kernel, kernel.pack(weight)))
        return weight, self._packed, chosen.name


def _placed(kernel: Kernel, packed: Packed, device: torch.device) -> Packed:
    return kernel.place(packed, device)


def _one(case: MatmulCase, weights: _Weights, others: Sequence[Environment], folder: Path, settings: Settings) -> Row:
    weight, packed, chosen = weights.packed(case)
    data = operands(case, weight)
    contenders: list[Contender] = [Local(name, _call(k, p, data), settings.clock) for name, (k, p) in packed.items()]
    schemes = dict.fromkeys(packed, case.scheme)
    absent: dict[str, str] = {}
    if settings.with_peers:
        found, absent = _peers(data, others, folder, settings)
        contenders += found
        schemes |= {p.name: p.scheme for p in peers.PEERS}
    times = interleaved(contenders, settings.rounds, settings.budget)
    truth = data.truth(ERROR_ROWS)
    errors = {c.name: _error(c.output(), truth) for c in contenders}
    us = {name: median(seconds) * 1e6 for name, seconds in times.items()}
    faster = {name: ratio(seconds, times[chosen]) for name, seconds in times.items() if name != chosen}
    best = min(times[chosen])
    limits, nbytes = settings.limits, round(packed[chosen][1].nbytes * data.used)
    return Row(
        *(case.n, case.k, case.m, case.group, case.scheme, settings.threads, chosen, us.pop(chosen)),
        rel_err=errors.pop(chosen),
        experts=case.experts,
        read=None if limits is None else nbytes / best / limits.read,
        peak=None if limits is None else case.operations / best / _peak(limits, case.scheme),
        peers=us,
        faster=faster,
        errors=errors,
        schemes={name: schemes[name] for name in us},
        absent=absent,
    )


def _peak(limits: Limits, scheme: str) -> float:
    return limits.int8 if scheme == "w4a8" else limits.bf16


def _call(kernel: Kernel, packed: Packed, data: Operands) -> Callable[[], torch.Tensor]:
    counts = data.counts
    if counts is None:
        return lambda: kernel.matmul(data.x, packed)
    return lambda: kernel.grouped_matmul(data.x, packed, counts)


def _peers(
    data: Operands, others: Sequence[Environment], folder: Path, settings: Settings
) -> tuple[list[Contender], dict[str, str]]:
    """Peers of this process, then what other environments add."""
    weight = data.weight
    given = peers.Data(
        weight.codes, weight.scales.float(), data.x.float(), weight.spec.group_size, settings.threads, data.counts
    )
    calls, reasons = peers.prepared(given)
    contenders: list[Contender] = [Local(name, call, settings.clock) for name, call in calls.items()]
    for environment in others:
        remote, why = environment.load(given, folder, settings.clock)
        new = [peer for peer in remote if peer.name not in {c.name for c in contenders}]
        contenders += new
        reasons = {name: reasons[name] for name in reasons.keys() & why.keys()}
    return contenders, reasons


def _error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return float((y[: len(truth)].double() - truth).norm() / truth.norm())


def load_average() -> float:
    """Processes that wanted to run in the last minute: above the number of threads, times are not to be trusted."""
    return os.getloadavg()[0]
