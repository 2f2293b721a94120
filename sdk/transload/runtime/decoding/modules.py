"""Modules of a transformers decoder as values of hal, or why one cannot be: linears, norms, MLPs, stacked experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from transload.errors import Unsupported
from transload.hal import DecoderLinear, DecoderMlp, Packed
from transload.runtime.experts import PROJECTIONS, QuantExperts, experts_refusal, is_experts
from transload.runtime.linear import QuantLinear
from transload.runtime.weight import AnyWeight, SplitWeight


def norm(module: Any, eps: float, name: str) -> Tensor:
    """The weight of a root-mean-square norm. Raises Unsupported for any other norm."""
    without_hooks(module, name)
    if not type(module).__name__.endswith("RMSNorm") or getattr(module, "variance_epsilon", None) != eps:
        raise Unsupported(f"{name} is {module}, expected a root-mean-square norm with eps {eps}")
    weight: Tensor = module.weight
    return weight


def linear(parent: nn.Module, name: str, *choices: tuple[str, ...]) -> DecoderLinear:
    """The first choice of members that the parent has, as one linear layer. Raises Unsupported, as all of these do."""
    for members in choices:
        if all(hasattr(parent, member) for member in members):
            parts = [part for m in members for part in _parts(getattr(parent, m), f"{name}.{m}")]
            return DecoderLinear(tuple(parts))
    raise Unsupported(f"{name} has no {choices[0][0]}")


def mlp(module: nn.Module, name: str) -> DecoderMlp:
    """A gated MLP with gate and up projection, together or one by one, and a down projection."""
    without_hooks(module, name)
    gate_up = linear(module, name, ("gate_up_proj",), ("gate_proj", "up_proj"))
    return DecoderMlp(gate_up, linear(module, name, ("down_proj",)))


def experts(module: nn.Module, name: str) -> DecoderMlp:
    """All experts of a layer, quantized or left in float."""
    without_hooks(module, name)
    if isinstance(module, QuantExperts):
        if not module.swiglu:
            raise Unsupported(f"{name} combine gate and up projection in a way of their own")
        gate_up, down = (DecoderLinear(tuple(_packed(module.weight_of(p), name))) for p in PROJECTIONS)
    elif is_experts(module) and experts_refusal(module) is None and of_transformers(module):
        gate_up, down = (DecoderLinear(((module.get_parameter(p), None),)) for p in PROJECTIONS)
    else:
        raise Unsupported(f"{name} is a {type(module).__name__}")
    return DecoderMlp(gate_up, down)


def of_transformers(module: nn.Module) -> bool:
    """Whether a module is of a model that transformers has, not of somebody who replaced it."""
    return type(module).__module__.startswith("transformers.models.")


def without_hooks(module: nn.Module, name: str) -> None:
    """Transformers' own hooks for output_hidden_states stay forever and do nothing unless those are asked for."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    replaced = vars(module).get("forward")  # older versions of transformers put a module's own forward there
    other = replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward
    if other or any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks):
        raise Unsupported(f"{name} has hooks, which one call for all layers would not reach")


def _parts(module: nn.Module, name: str) -> Iterator[tuple[Packed | Tensor, Tensor | None]]:
    without_hooks(module, name)
    if type(module) is nn.Linear:
        yield module.weight, module.bias
    elif type(module) is QuantLinear and module.packed is not None:
        start = 0
        for packed, _ in _packed(module.packed, name):
            yield packed, None if module.bias is None else _rows(module.bias, start, packed.n)
            start += packed.n
    else:
        raise Unsupported(f"{name} is a {type(module).__name__}")


def _packed(weight: AnyWeight, name: str) -> Iterator[tuple[Packed, None]]:
    for part in weight.packed_parts() if isinstance(weight, SplitWeight) else [weight]:
        if part.lent:
            raise Unsupported(f"{name} comes and goes with the plan that spreads the model")
        yield part.packed, None


def _rows(bias: Tensor, start: int, count: int) -> Tensor:
    return bias if count == len(bias) else bias[start : start + count]
