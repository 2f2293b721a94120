"""Where one quantized module goes: as it is, in an exact form, as floats, or rounded to another scheme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import torch

from transload.checkpoint import Checkpoint
from transload.engine import Rule
from transload.formats.base import Format
from transload.formats.plain import Plain
from transload.models.roles import kept_in_float, role_of
from transload.porting.plan import DTYPES, Action, Layout, Options, Output
from transload.porting.schemes import Choice, Schemes
from transload.porting.target import Target
from transload.quant import ActSpec, QTensor, QuantSpec, Zero
from transload.rewrite import exact_forms

# Float linears that a scheme for everything is for. kv_b_proj is absorbed into attention when a model is loaded.
_LINEARS = ("attention", "shared_experts", "experts", "mlp")
_ABSORBED = "kv_b_proj"
_Kind = tuple[QuantSpec, tuple[int, ...], bool, bool]
_COMMON = 4  # a width that every container of quantized weights has


class Placer:
    """Decides one module at a time; equal schemes and shapes are looked at once. Refusals are collected by name."""

    def __init__(self, source: Checkpoint, target: Target, options: Options) -> None:
        self.target, self.options = target, options
        self.refusals: dict[str, str] = {}
        self._entries, self._depth = source.entries, _depth(source)
        self._answers: dict[_Kind, str | None] = {}
        self._forms_taken: dict[_Kind, QuantSpec | None] = {}
        self._reasons: dict[_Kind, str] = {}
        self._layouts: dict[tuple[QuantSpec, tuple[int, ...], str], Layout] = {}

    def quantized(self, name: str, spec: QuantSpec, shape: tuple[int, ...], expert: int | None) -> Output:
        """What becomes of a quantized module."""
        kept, choice = kept_in_float(name), self._choice(name, spec.bits)
        if isinstance(self.target.format, Plain) or (kept == "embedding" and not self.target.format.embeddings):
            return self._dequantized(name, shape, expert)
        named = choice is not None and choice.pattern != ""
        stays = kept is not None and self.target.format.embeddings and not named  # the format keeps heads quantized too
        anew = self.options.everything and choice is not None and not stays
        exact = None if anew else self.taken(name, spec, shape)
        if exact is not None:
            return self.in_form(name, exact, shape, expert)
        if kept is not None and not named:  # heads and routers suffer most from rounding, and every target has floats
            return self._dequantized(name, shape, expert)
        return self.requantized(name, spec, shape, expert)

    def floating(self, name: str, dtype: str, shape: tuple[int, ...], expert: int | None) -> Output:
        """What becomes of a float tensor: itself, or codes where a scheme was asked for everything."""
        module = name.removesuffix(".weight")
        choice = self._choice(module, 16) if self.options.everything else None
        if choice is None or choice.scheme is None or not self._is_linear(name, module, shape, choice):
            return Output(name, Action.COPY, None, {name: (DTYPES[dtype], shape)}, expert)
        return self._rounded(module, choice.scheme, None, shape, expert)

    def in_form(self, name: str, spec: QuantSpec, shape: tuple[int, ...], expert: int | None) -> Output:
        """The same numbers under a scheme that the target takes."""
        return Output(name, Action.REPACK, spec, self._layout(name, spec, shape), expert)

    def requantized(
        self, name: str, spec: QuantSpec, shape: tuple[int, ...], expert: int | None, why: str = ""
    ) -> Output:
        """Other numbers where the caller allows them, else a refusal. why: the reason, if not the scheme's own."""
        choice = self._choice(name, spec.bits)
        if choice is None:
            self.refusals[name] = why or self.reason(name, spec, shape)
            return Output(name, Action.REPACK, spec, {}, expert)
        if choice.scheme is None:
            return self._dequantized(name, shape, expert)
        return self._rounded(name, choice.scheme, spec, shape, expert)

    def taken(self, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> QuantSpec | None:
        """The nearest exact form of a scheme that the target takes.

        An engine may want other activations declared than it then multiplies with. Such a form is taken too, unless
        the caller said what to declare or the engine would multiply with fewer bits than `spec` asks for. Forms with
        wider codes come last: they cost memory.
        """
        kind = self._kind(name, spec, shape)
        if kind not in self._forms_taken:
            forms = [*self._forms(spec), *self._forms_with_other_activations(spec)]
            taken = (
                form
                for form in sorted(forms, key=lambda form: form.bits > spec.bits)
                if self.refuses(name, form, shape) is None and self._keeps_precision(name, form, shape, spec)
            )
            self._forms_taken[kind] = next(taken, None)
        return self._forms_taken[kind]

    def rounds_to(self, name: str, scheme: QuantSpec, shape: tuple[int, ...]) -> QuantSpec | None:
        """The form of a scheme that numbers are rounded to. Four bits kept in eight are not what was asked for."""
        form = self.taken(name, scheme, shape)
        if form is None or form.bits == scheme.bits:
            return form
        return None if scheme.bits == _COMMON or form.zero is not scheme.zero else form

    def refuses(self, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """The target's answer for a scheme and shape."""
        kind = self._kind(name, spec, shape)
        if kind not in self._answers:
            self._answers[kind] = self.target.refuses(name, spec, shape, self.biased(name))
        return self._answers[kind]

    def reason(self, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> str:
        """Why no form of a scheme is taken: the engine's reason where the format would hold one."""
        kind = self._kind(name, spec, shape)
        if kind not in self._reasons:
            forms = list(self._forms(spec))
            held = [form for form in forms if self.target.format.cannot_hold(form, shape) is None]
            self._reasons[kind] = self.refuses(name, held[0] if held else forms[0], shape) or ""
        return self._reasons[kind]

    def _kind(self, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> _Kind:
        """What decides about a module; there are few kinds, and thousands of experts of each."""
        return spec, shape, ".experts." in name, self.biased(name)

    def biased(self, name: str) -> bool:
        """True when a module has a bias."""
        return f"{name}.bias" in self._entries

    def _rounded(
        self, name: str, scheme: QuantSpec, spec: QuantSpec | None, shape: tuple[int, ...], expert: int | None
    ) -> Output:
        if self.options.act is not None:
            scheme = replace(scheme, act=self.options.act[0])
        form = self.rounds_to(name, scheme, shape)
        if form is None:
            self.refusals[name] = f"{scheme} instead of {spec or 'float'}: {self.reason(name, scheme, shape)}"
            return Output(name, Action.REQUANTIZE, scheme, {}, expert, scheme)
        return Output(name, Action.REQUANTIZE, form, self._layout(name, form, shape), expert, scheme)

    def _choice(self, name: str, bits: int) -> Choice | None:
        schemes = self.options.requantize
        return schemes.of(name, bits) if isinstance(schemes, Schemes) else None

    def _is_linear(self, name: str, module: str, shape: tuple[int, ...], choice: Choice) -> bool:
        if len(shape) != 2 or name == module or isinstance(self.target.format, Plain) or self._predicts(module):
            return False
        wanted = role_of(module) in _LINEARS and module.rpartition(".")[2] != _ABSORBED
        return wanted or (choice.pattern != "" and kept_in_float(module) != "embedding")

    def _predicts(self, module: str) -> bool:
        """True inside a layer of multi-token prediction, which lies behind the model's layers and stays in float."""
        parts = module.split(".")
        numbers = [int(b) for a, b in pairwise(parts) if a == "layers" and b.isdecimal()]
        return "mtp" in parts or (bool(numbers) and numbers[0] >= self._depth)

    def _forms(self, spec: QuantSpec) -> Iterator[QuantSpec]:
        return exact_forms(spec, self.target.format.group_size)

    def _forms_with_other_activations(self, spec: QuantSpec) -> Iterator[QuantSpec]:
        if self.target.engine is None or self.options.act is not None or (spec.act and spec.act != ActSpec()):
            return iter(())
        return self._forms(replace(spec, act=ActSpec() if spec.act is None else None))

    def _keeps_precision(self, name: str, form: QuantSpec, shape: tuple[int, ...], asked: QuantSpec) -> bool:
        if form.act == asked.act:
            return True
        rule = self.target.rule(self.target.layer(name, form, shape, self.biased(name)))
        return isinstance(rule, Rule) and (asked.act is not None or rule.runs_as(form).endswith("A16"))

    def _dequantized(self, name: str, shape: tuple[int, ...], expert: int | None) -> Output:
        plain = self.target.format
        dtype = plain.dtype if isinstance(plain, Plain) else self.options.floats
        return Output(name, Action.DEQUANTIZE, None, {f"{name}.weight": (dtype, shape)}, expert)

    def _layout(self, name: str, spec: QuantSpec, shape: tuple[int, ...]) -> Layout:
        last = name.rpartition(".")[2]  # msModelSlim's scale_bias has another shape for down_proj and the like
        key = (spec, shape, last)
        if key not in self._layouts:
            self._layouts[key] = _encoded(self.target.format, spec, shape, last)
        return {name + part: where for part, where in self._layouts[key].items()}


def _depth(source: Checkpoint) -> int:
    """The number of decoder layers that config.json declares; a large number where it does not."""
    inner = source.config.get("text_config")
    for config in (inner if isinstance(inner, dict) else {}, source.config):
        layers = config.get("num_hidden_layers")
        if isinstance(layers, int) and not isinstance(layers, bool):
            return layers
    return 1 << 30


def _encoded(format: Format, spec: QuantSpec, shape: tuple[int, ...], name: str) -> Layout:
    """The tensors that `encode` gives, names after the module's, found by encoding zeros.

    Tensors without data would do, but their first use in torch imports its compiler, which takes seconds. One expert
    stands for a stack.
    """
    if len(shape) == 3 and shape[0] > 1:
        one = _encoded(format, spec, (1, *shape[1:]), name)
        return {part: (dtype, _stacked(dims, shape[0])) for part, (dtype, dims) in one.items()}
    side = (*shape[:-1], spec.groups(shape[-1]))
    zero_dtype = {Zero.CODES: torch.uint8, Zero.FLOATS: spec.scale_dtype}.get(spec.zero)
    zeros = QTensor(
        spec,
        torch.zeros(shape, dtype=torch.uint8),
        torch.ones(side, dtype=spec.scale_dtype),
        None if zero_dtype is None else torch.zeros(side, dtype=zero_dtype),
        torch.zeros(side, dtype=spec.scale_dtype) if spec.zero is Zero.MINS else None,
        torch.zeros(shape[-1], dtype=torch.int32) if spec.act_order else None,
    )
    tensors = format.encode(name, zeros)
    return {full.removeprefix(name): (t.dtype, tuple(t.shape)) for full, t in tensors.items()}


def _stacked(dims: tuple[int, ...], experts: int) -> tuple[int, ...]:
    """A shape with the number of experts where one expert's has its first 1; behind a 0 in markers without data."""
    lead = dims[:1] if dims[:2] == (0, 1) else ()
    return (*lead, experts, *dims[len(lead) + 1 :])
