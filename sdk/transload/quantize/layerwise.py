"""One decoder layer: run it over the calibration text, fold what has to be folded, quantize, run it again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from transload.errors import ConfigError, FormatError
from transload.quant import QTensor, QuantSpec
from transload.quantize import awq
from transload.quantize.block import block_of, sample_windows
from transload.quantize.clip import quantize_clipped
from transload.quantize.fold import Fold
from transload.quantize.gptq import Factor, factor, gptq
from transload.quantize.held import Filled, Held, held_of
from transload.quantize.hidden import Hidden
from transload.quantize.recipe import Method, Recipe
from transload.quantize.rtn import quantize_mse
from transload.quantize.smoothquant import fold_smooth
from transload.quantize.statistics import Statistics, Watch, stride_of
from transload.requantize import requantize

_GRAM_BYTES = 6 << 30  # Hessians in memory at a time; a layer whose experts need more is run over the text again
_TOKENS_AT_ONCE = 1024
_SLAB = 1 << 22  # values compared at a time
GPTQ = ("gptq", "awq+gptq")  # methods that want a factored Hessian
GRAM = (*GPTQ, "awq")  # methods that want one
SAME = 0.05  # what a layer may differ by after a fold: rounded gains and routers, far less than a wrong one
Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Assigned:
    """What the recipe wants for one stored module. note: a difference from the recipe, in words."""

    spec: QuantSpec
    method: Method
    note: str = ""


@dataclass(frozen=True, slots=True)
class Made:
    """How one module was quantized. SQNRs are in decibels: of the weight, and of the outputs on calibration text."""

    name: str
    scheme: str
    method: str
    tokens: int
    weight_sqnr: float
    output_sqnr: float | None
    note: str = ""


@dataclass(slots=True)
class LayerResult:
    """Quantized modules by stored name, changed float parameters by name in the layer, changed weights of linears
    that stay in float by stored module, and how they came to be."""

    modules: dict[str, QTensor] = field(default_factory=dict)
    floats: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    made: list[Made] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class LayerJob:
    """The work on one filled layer. assigned: by stored module; what is not in it stays in float."""

    def __init__(self, label: str, filled: Filled, recipe: Recipe, assigned: Mapping[str, Assigned]) -> None:
        self.label, self.filled, self.recipe, self.assigned = label, filled, recipe, assigned
        self.result = LayerResult()
        self._held = held_of(filled.layer)
        self._wanted = [h for _, h in self._held if any(n in assigned for n in h.names)]
        self._factors: dict[tuple[int, int], Factor] = {}
        self._last_use = False
        for _, held in self._held:
            held.precision = getattr(torch, recipe.calibration.precision)

    def check_weights(self) -> None:
        """Raises FormatError for weights that are not finite."""
        for _, held in self._held:
            if held.weight is not None and not bool(torch.isfinite(held.weight).all()):
                raise FormatError(f"{self.label}: {', '.join(held.names)} contains NaN or infinity")

    def quantize(self, forward: Forward, hidden: Hidden | None) -> LayerResult:
        """Everything. hidden: the layer's inputs, None when the recipe needs no text."""
        if hidden is None or not self._wanted:
            for held in self._wanted:
                self._quantize(held, None)
        else:
            self._calibrated(forward, hidden)
        for _, held in self._held:
            for name, at in held.parts() if held.changed else ():
                if name not in self.assigned:
                    self.result.weights[name] = held.rows(at).to(held.stored_dtype)
        return self.result

    def _calibrated(self, forward: Forward, hidden: Hidden) -> None:
        rounds = self._rounds()
        folds = self.recipe.smooth is not None or any(a.method in awq.METHODS for a in self.assigned.values())
        if folds and len(rounds) > 1:  # scales need all linears at once, but no Hessians
            self._fold(forward, hidden, self._watched(forward, hidden, self._wanted, grams=False))
        for round in rounds:
            watch = self._watched(forward, hidden, round)
            if folds and len(rounds) == 1:
                self._fold(forward, hidden, watch)
            for held in round:
                statistics = watch.of.pop(held, None)
                sizes = {self.assigned[n].spec.group_size for n in held.names if n in self.assigned}
                self._last_use = len(sizes) == 1 and all(s is not statistics for s in watch.of.values())
                self._quantize(held, statistics)
            self._factors.clear()

    def advance(self, forward: Forward, hidden: Hidden, out: Hidden) -> None:
        """The layer's outputs, with its quantized weights, for the next layer."""
        with torch.no_grad():
            for at in hidden.batches(_TOKENS_AT_ONCE):
                out[at] = forward(hidden[at])

    def _rounds(self) -> list[list[Held]]:
        """Linears whose statistics are taken together: all, unless memory or `sequential` asks for more passes."""
        if self.recipe.sequential:
            return _by_stage(self._held, set(self._wanted))
        rounds: list[list[Held]] = [[]]
        used = 0
        for held in self._wanted:
            size = 4 * held.k**2 if self._needs_gram(held) else 0
            if held.routed and rounds[-1] and used + size > _GRAM_BYTES:
                rounds.append([])
                used = 0
            rounds[-1].append(held)
            used += size
        return rounds

    def _watched(self, forward: Forward, hidden: Hidden, round: Sequence[Held], grams: bool = True) -> Watch:
        watch = Watch(
            {held for held in round if grams and self._needs_gram(held)},
            stride_of(hidden.count, hidden.tokens),
            getattr(torch, self.recipe.calibration.precision),
        )
        for held in round:
            held.watch = watch
        try:
            with torch.no_grad():
                for at in hidden.batches(_TOKENS_AT_ONCE):
                    forward(hidden[at])
        finally:
            for held in round:
                held.watch = None
        watch.finish()
        for held in round:
            if held in watch.of and not watch.of[held].finite:
                raise ConfigError(f"{self.label}: {', '.join(held.names)} got NaN or infinite activations")
        return watch

    def _fold(self, forward: Forward, hidden: Hidden, watch: Watch) -> None:
        """Scales moved between producers and consumers, checked on one window: the layer must compute the same."""
        folds: list[Fold] = []
        if self.recipe.smooth is not None:
            folds += fold_smooth(self.filled, self._held, self.assigned, watch, self.recipe.smooth)
        else:
            windows = sample_windows(hidden)
            part = partial(block_of, self.filled.layer, forward=forward, windows=windows)
            folds += awq.fold_awq(self.filled, self._held, self.assigned, watch, part)
        if not folds:
            return
        with torch.no_grad():
            window = hidden[slice(0, 1)]
            before = forward(window)
            for fold in folds:
                self.result.floats |= fold.apply(self.filled, watch)
            after = forward(window)
        apart = float((after - before).norm() / (before - window).norm().clamp(min=1e-30))
        if not apart < SAME:
            raise ConfigError(
                f"{self.label}: folding {', '.join(f.pair.label for f in folds)} changes the layer by "
                f"{apart:.1e}; this architecture needs a recipe without smoothing and AWQ"
            )
        for fold in folds:
            self.result.notes.append(f"{self.label}: {fold}")

    def _quantize(self, held: Held, statistics: Statistics | None) -> None:
        made = {}
        for name, at in held.parts():
            if name in self.assigned:
                assigned = self.assigned[name]
                method, note = self._method(held, assigned, statistics)
                prepared, extra = self._prepared(statistics, assigned.spec, method)  # before a float32 copy is made
                if prepared is not None:
                    made[name] = gptq(held.stored_rows(at), assigned.spec, prepared)
                else:
                    made[name] = _codes(held.rows(at), assigned.spec, method, statistics)
                weight = held.rows(at)
                note = "; ".join(n for n in (assigned.note, note, extra) if n)
                tokens = 0 if statistics is None else statistics.tokens
                quality = sqnr(weight, made[name])
                rows = None if statistics is None else statistics.rows
                output = None if rows is None or not len(rows) else output_sqnr(weight, made[name], rows)
                label = "rtn" if note and method == "mse" and assigned.method != "mse" else method
                self.result.made.append(Made(name, str(assigned.spec), label, tokens, quality, output, note))
        self.result.modules |= made
        held.take(made)

    def _method(self, held: Held, assigned: Assigned, statistics: Statistics | None) -> tuple[Method, str]:
        """The recipe's method, or rounding to nearest and why."""
        if assigned.method in ("rtn", "mse"):
            return assigned.method, ""
        if statistics is None or not statistics.tokens:
            return "mse", "no calibration token reached it: rounded to nearest"
        few = self.recipe.calibration.expert_tokens
        if held.routed and statistics.tokens < few:
            return "mse", f"only {statistics.tokens} tokens reached it, fewer than {few}: rounded to nearest"
        if float(statistics.absmax.max()) == 0:
            return "mse", "its inputs are all zero: rounded to nearest"
        return assigned.method, ""

    def _prepared(self, statistics: Statistics | None, spec: QuantSpec, method: Method) -> tuple[Factor | None, str]:
        """The factor of a Hessian for methods that want one, made once for all linears with this input and group size;
        and a note."""
        if statistics is None or method not in GPTQ:
            return None, ""
        key = id(statistics), spec.group_size
        if key not in self._factors:
            assert statistics.gram is not None
            self._factors.clear()
            settings = self.recipe.damping, self.recipe.act_order
            self._factors[key] = factor(statistics.gram, spec.group_size, *settings, consume=self._last_use)
            if self._last_use:  # a Hessian becomes the factor of its last linear
                statistics.gram = None
        found = self._factors[key]
        raised = found.damping > self.recipe.damping
        return found, f"the Hessian is singular: damping raised to {found.damping:g}" if raised else ""

    def _needs_gram(self, held: Held) -> bool:
        return any(self.assigned[n].method in GRAM for n in held.names if n in self.assigned)


def _codes(weight: Tensor, spec: QuantSpec, method: Method, statistics: Statistics | None) -> QTensor:
    if method == "rtn":
        return requantize(weight, spec)[0]
    if method == "awq" and statistics is not None and statistics.gram is not None:
        return quantize_clipped(weight, spec, statistics.gram)
    return quantize_mse(weight, spec)


def _by_stage(held: Sequence[tuple[str, Held]], wanted: set[Held]) -> list[list[Held]]:
    """Linears in the order in which a layer uses them: attention in, attention out, MLP in, MLP out."""
    stages: list[list[Held]] = [[], [], [], []]
    for name, h in held:
        if h in wanted:
            attention = "mlp" not in name and "moe" not in name and "expert" not in name
            last = name.rpartition(".")[2]
            closing = last in ("o_proj", "out_proj", "down_proj", "dense", "w2") or ".down." in name
            stages[(0 if attention else 2) + closing].append(h)
    return [stage for stage in stages if stage]


def sqnr(want: Tensor, got: QTensor) -> float:
    """10 log10 of signal power over error power of a weight [N, K]; infinite when equal. In slabs of rows."""
    return _decibels((rows, got.rows(at.start, at.stop).dequantize()) for rows, at in _slabs(want))


def output_sqnr(weight: Tensor, w: QTensor, inputs: Tensor) -> float:
    """The same of the outputs for inputs [S, K]."""
    return _decibels((inputs @ r.T, inputs @ w.rows(at.start, at.stop).dequantize().T) for r, at in _slabs(weight))


def _slabs(weight: Tensor) -> Iterator[tuple[Tensor, slice]]:
    step = max(1, _SLAB // weight.shape[1])
    for start in range(0, len(weight), step):
        at = slice(start, min(start + step, len(weight)))
        yield weight[at], at


def _decibels(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    error = signal = 0.0
    for want, got in pairs:
        error += float((got - want).square().sum(dtype=torch.float64))
        signal += float(want.square().sum(dtype=torch.float64))
    return math.inf if error == 0 else 10 * math.log10(max(signal, 1e-300) / error)
