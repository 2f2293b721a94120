"""Putting quantized modules in the place of a model's own, and filling them."""

from __future__ import annotations

from typing import cast

from torch import nn

from transload.errors import FormatError
from transload.runtime.below import KeptWeight
from transload.runtime.embedding import QuantEmbedding
from transload.runtime.experts import PROJECTIONS, QuantExperts, experts_refusal, is_experts
from transload.runtime.gather import Weight
from transload.runtime.linear import QuantLinear
from transload.runtime.placement import Target

Quantized = QuantLinear | QuantEmbedding | QuantExperts


def owner_of(parameter: str) -> str:
    """The module of a parameter name: "lm_head.weight" -> "lm_head"."""
    return parameter.rpartition(".")[0]


def refusal(module: nn.Module, parameter: str) -> str | None:
    """Why no quantized module can stand in for the one that holds this parameter; None when one can."""
    member = parameter.rpartition(".")[2]
    if is_experts(module) and member in PROJECTIONS:
        return experts_refusal(module)
    if isinstance(module, Quantized) or (type(module) in (nn.Linear, nn.Embedding) and member == "weight"):
        return None
    return f"{type(module).__name__} computes with float weights"


def stand_in(model: nn.Module, name: str, keep_meta: bool) -> Quantized:
    """Replaces module `name` by its quantized stand-in, unfilled, and returns that.

    keep_meta: the stand-in keeps the float parameters on the meta device, under their names, so that transformers goes
    on expecting them; they go when it is filled.
    """
    module = model.get_submodule(name)
    if isinstance(module, Quantized):
        return module
    weights = {n: p for n, p in module.named_parameters(recurse=False) if n != "bias"}
    dtype = next(iter(weights.values())).dtype
    new: Quantized
    if isinstance(module, nn.Linear):
        new = QuantLinear(module.in_features, module.out_features, module.bias)
    elif isinstance(module, nn.Embedding):
        new = QuantEmbedding(module.num_embeddings, module.embedding_dim, module.padding_idx, dtype)
    else:
        new = QuantExperts.replacing(module)
    if keep_meta:
        for member, weight in weights.items():
            new.register_parameter(member, nn.Parameter(weight.detach(), requires_grad=False))
    new.train(module.training)
    model.set_submodule(name, new)
    return new


def fill(model: nn.Module, parameter: str, w: Weight | KeptWeight, to: Target) -> None:
    """Packs a weight into the stand-in that holds `parameter`. Raises NoKernel, FormatError for a wrong shape."""
    name, _, member = parameter.rpartition(".")
    module = cast(Quantized, model.get_submodule(name))
    module._parameters.pop(member, None)
    try:
        module.fill(member, w, to)
    except FormatError as e:
        raise FormatError(f"{name}: {e}") from e


def unfilled(model: nn.Module) -> list[str]:
    """Stand-ins that got no weight, by name."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, Quantized) and any(child is None for child in module._modules.values())
    ]
