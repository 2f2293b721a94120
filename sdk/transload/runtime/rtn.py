"""Quantizing a float model while transformers loads it: every weight is rounded and packed as it arrives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps

from transload.errors import ConfigError, NoKernel, Unsupported
from transload.models.roles import kept_in_float, skipped
from transload.quant import QTensor, QuantSpec, Zero, fuse_rows, stack_experts
from transload.reference import quantize_rtn
from transload.runtime import standins
from transload.runtime.config import TransloadConfig
from transload.runtime.experts import PROJECTIONS, is_experts
from transload.runtime.placement import place
from transload.runtime.targets import Targets
from transload.runtime.tied import fill_tied, take_ties

_VALUES_AT_ONCE = 1 << 24  # rounding needs about ten bytes a value for a moment


class RoundedWeights:
    """Which parameters of one model are quantized on load, with which scheme, and how each of them is.

    specs: the scheme by parameter name. kept: modules whose weights stay in float, and why. notes: what differs from
    the request, by module.
    """

    def __init__(self, config: TransloadConfig, model: PreTrainedModel, targets: Targets) -> None:
        self.config, self.targets = config, targets
        self.specs: dict[str, QuantSpec] = {}
        self.kept: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self._heads = set(model.all_tied_weights_keys.values()) if config.quantize_head else set()
        for name, parameters in _candidates(model, config.quantize_head):
            self._consider(model, name, parameters)
        if not self.specs:
            reasons = "; ".join(sorted(set(self.kept.values()))) or "it has no linear layers"
            raise Unsupported(f"nothing in {type(model).__name__} can be quantized on load: {reasons}")
        self.ties = take_ties(model, self.specs)
        for parameter in self.specs:
            for member in (parameter, *self.ties.get(parameter, ())):
                standins.stand_in(model, standins.owner_of(member), keep_meta=member == parameter)

    def _consider(self, model: nn.Module, name: str, parameters: tuple[str, ...]) -> None:
        """Enters a module's parameters into specs, or the module into kept."""
        module = model.get_submodule(name)
        reason = kept_in_float(name, heads=not self.config.quantize_head)
        if isinstance(module, nn.Embedding) and f"{name}.weight" not in self._heads:
            reason = "embedding"
        if pattern := skipped(name, tuple(self.config.skip_modules)):
            reason = f"skip_modules has '{pattern}'"
        reason = reason or next((r for p in parameters if (r := standins.refusal(module, f"{name}.{p}"))), None)
        if reason is None:
            try:
                specs = {f"{name}.{p}": self._spec(getattr(module, p), name) for p in parameters}
            except (ConfigError, NoKernel) as e:
                reason = str(e)
            else:
                self.specs |= specs
        if reason is not None:
            self.kept[name] = reason

    def _spec(self, weight: Tensor, name: str) -> QuantSpec:
        """The scheme of a weight [..., N, K], tried on the device's kernels. Raises ConfigError, NoKernel."""
        spec = self.config.spec(weight.shape[-1])
        if spec.group_size != self.config.group_size:
            asked = self.config.group_size
            self.notes[name] = (
                f"group_size {asked} does not divide {weight.shape[-1]} inputs: {spec.group_size} is used"
            )
        place(_without_numbers(weight, spec), self.targets.of(name))
        return spec

    def fill(self, model: nn.Module, parameter: str, weight: Tensor) -> None:
        """Rounds and packs one parameter. Raises ValueError when the weight is not finite."""
        w = _round(weight, self.specs[parameter])
        to, followers = self.targets.of(standins.owner_of(parameter)), self.ties.get(parameter, ())
        if followers:
            fill_tied(model, parameter, followers, w, to)
        else:
            standins.fill(model, parameter, w, to)
            self.targets.filled(model, standins.owner_of(parameter))


class QuantizeOnLoad(ConversionOps):  # type: ignore[misc]
    """The step that transformers runs on every weight that is to be quantized: it goes into the stand-in here."""

    def __init__(self, rounded: RoundedWeights) -> None:
        self._rounded = rounded

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str] | None = None,
        target_patterns: list[str] | None = None,
        model: PreTrainedModel | None = None,
        missing_keys: set[str] | None = None,
        **unused: object,
    ) -> dict[str, Tensor]:
        """Takes the weights to be quantized out of `input_dict`; transformers sets the ones returned."""
        rest = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if name in self._rounded.specs:
                assert model is not None
                self._rounded.fill(model, name, weight)
                (missing_keys if missing_keys is not None else set()).discard(name)
            else:
                rest[name] = weight
        return rest


def _candidates(model: PreTrainedModel, heads: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules that hold matrices of weights, and the names of those; what is not linear is refused later, by name.

    heads: whether output heads may be quantized. One that is tied to an embedding has no weight in the checkpoint, and
    the embedding stands for both.
    """
    tied = model.all_tied_weights_keys if heads else {}
    for name, module in list(model.named_modules()):
        parameters = PROJECTIONS if is_experts(module) else _matrices(module)
        parameters = tuple(p for p in parameters if f"{name}.{p}" not in tied)
        if parameters:
            yield name, parameters


def _matrices(module: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, p in module.named_parameters(recurse=False) if p.dim() in (2, 3))


def _round(weight: Tensor, spec: QuantSpec) -> QTensor:
    """RTN in parts, so that the float intermediates stay small: by expert, and by rows."""
    if weight.dim() == 3:
        return stack_experts([_round(expert, spec) for expert in weight])
    rows = max(1, _VALUES_AT_ONCE // weight.shape[1])
    parts = [quantize_rtn(part, spec) for part in torch.split(weight, rows)]
    return parts[0] if len(parts) == 1 else fuse_rows(parts)


def _without_numbers(weight: Tensor, spec: QuantSpec) -> QTensor:
    """A QTensor of the right shapes on the meta device: enough to ask kernels."""
    *lead, n, k = weight.shape
    sides = (*lead, n, spec.groups(k))
    zeros = torch.empty(sides, dtype=torch.uint8, device="meta") if spec.zero is Zero.CODES else None
    codes = torch.empty(*lead, n, k, dtype=torch.uint8, device="meta")
    return QTensor(spec, codes, torch.empty(sides, dtype=spec.scale_dtype, device="meta"), zeros)
