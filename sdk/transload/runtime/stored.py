"""Filling a model from a quantized checkpoint: stand-ins before transformers loads the float tensors, numbers after."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from transload.checkpoint import Checkpoint
from transload.quant import QTensor
from transload.runtime import standins
from transload.runtime.below import KeptWeight
from transload.runtime.config import Progress
from transload.runtime.embedding import QuantEmbedding, RowStore
from transload.runtime.gather import Weight, assemble
from transload.runtime.linear import QuantLinear
from transload.runtime.packed_cache import PackedCache
from transload.runtime.targets import Targets
from transload.runtime.tied import fill_tied, take_ties
from transload.runtime.trace import parameters_from, used
from transload.runtime.weight import AnyWeight


class StoredWeights:
    """The quantized part of a checkpoint, on its way into one model.

    floats: parameters that are quantized in the checkpoint but that the model uses as floats, and why. unused: modules
    of the checkpoint that the model has no place for. conversions: transformers' rules that apply to this checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.checkpoint = checkpoint
        shapes = {e.name: e.shape for e in checkpoint.entries.values() if e.spec is not None}
        floats = [e.name for e in checkpoint.entries.values() if e.spec is None]
        conversions = get_model_conversion_mapping(model)
        self.recipes, self.unused = parameters_from(shapes, floats, model, conversions)
        self.conversions = used(conversions)
        self._ties = take_ties(model, self.recipes, checkpoint.entries)
        self.floats: dict[str, str] = {}
        for parameter in self.recipes:
            self._prepare(model, self._group(parameter))

    def _group(self, parameter: str) -> tuple[str, ...]:
        return (parameter, *self._ties.get(parameter, ()))

    def _prepare(self, model: PreTrainedModel, group: tuple[str, ...]) -> None:
        """Stand-ins for tied parameters: all of them or none, as they share one weight."""
        reasons = [standins.refusal(model.get_submodule(standins.owner_of(name)), name) for name in group]
        reason = next((r for r in reasons if r is not None), None)
        for name in group:
            if reason is None:
                standins.stand_in(model, standins.owner_of(name), keep_meta=False)
            else:
                self.floats[name] = reason

    def fill(
        self,
        model: PreTrainedModel,
        targets: Targets,
        progress: Progress | None = None,
        cache: PackedCache | None = None,
    ) -> None:
        """Decodes, packs and places every quantized parameter, one at a time; cache: unless it is packed already."""
        entries = self.checkpoint.entries
        done, total = 0, sum(entry.stored_bytes for entry in entries.values())
        for parameter, recipe in self.recipes.items():
            to, group = targets.of(standins.owner_of(parameter)), self._group(parameter)
            w: Weight | KeptWeight | None = None
            if cache is not None and parameter not in self.floats:
                w = cache.weight(parameter, to, self._looked_up(model, group))
            w = assemble(parameter, recipe, self._decode) if w is None else w
            if parameter in self.floats:
                assert not isinstance(w, KeptWeight)
                weight = w.dequantize().to(to.torch_device, targets.base.x_dtype)
                _set_floats(model, group, nn.Parameter(weight, requires_grad=False))
            elif len(group) > 1:
                fill_tied(model, parameter, group[1:], w, to)
            else:
                standins.fill(model, parameter, w, to)
                targets.filled(model, standins.owner_of(parameter))
            if progress is not None:
                done += sum(entries[name].stored_bytes for name in recipe.sources())
                progress(done, total)
        if cache is not None:
            cache.finish({name: self._weight(model, name) for name in self.recipes if name not in self.floats})
        if progress is not None:
            progress(total, total)

    def _looked_up(self, model: PreTrainedModel, group: tuple[str, ...]) -> bool:
        """Whether parameters that share a weight belong to embeddings only."""
        modules = (model.get_submodule(standins.owner_of(name)) for name in group)
        return all(isinstance(module, QuantEmbedding) for module in modules)

    def _weight(self, model: PreTrainedModel, parameter: str) -> AnyWeight | RowStore:
        """What a parameter was packed into: its own module's, or for a tied one the head's."""
        modules = [model.get_submodule(standins.owner_of(name)) for name in self._group(parameter)]
        module = next((m for m in modules if isinstance(m, QuantLinear)), modules[0])
        assert isinstance(module, standins.Quantized)
        return module.weight_of(parameter.rpartition(".")[2])

    def _decode(self, name: str) -> QTensor:
        return self.checkpoint.decode(self.checkpoint.entries[name])


def _set_floats(model: nn.Module, names: tuple[str, ...], weight: torch.nn.Parameter) -> None:
    for name in names:
        owner, _, member = name.rpartition(".")
        setattr(model.get_submodule(owner), member, weight)
