"""A mixture of experts as hal describes it: what its router computes, its experts, and what all tokens share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from transload.errors import Unsupported
from transload.hal import DecoderExperts, DecoderLinear, DecoderMlp
from transload.runtime.decoding import modules
from transload.runtime.decoding.families import Mixture


def mixture(block: Any, kind: Mixture, config: Any, name: str) -> tuple[DecoderMlp | None, DecoderExperts]:
    """The MLP beside the experts, and the experts. Raises Unsupported with the reason."""
    modules.without_hooks(block, name)
    router = block.gate
    shared = None if kind.shared is None else modules.mlp(getattr(block, kind.shared), f"{name}.{kind.shared}")
    groups = _setting(router, config, "num_group", "n_group") if kind.sigmoid else 1
    top_groups = _setting(router, config, "topk_group", "topk_group") if groups > 1 else 1
    scaling = _setting(router, config, "routed_scaling_factor", "routed_scaling_factor") if kind.sigmoid else 1
    top_k = _setting(router, config, "top_k", "num_experts_per_tok")
    if (
        top_k > len(router.weight) // groups * top_groups
    ):  # what is chosen then differs between versions of transformers
        raise Unsupported(f"{name} takes {top_k} experts, more than {top_groups} of its {groups} groups have")
    return shared, DecoderExperts(
        router=_router(router, f"{name}.gate"),
        each=modules.experts(block.experts, f"{name}.experts"),
        top_k=top_k,
        sigmoid=kind.sigmoid,
        bias=getattr(router, "e_score_correction_bias", None),
        groups=groups,
        top_groups=top_groups,
        normalized=kind.always_normalized or bool(_setting(router, config, "norm_topk_prob", "norm_topk_prob")),
        scaling=float(scaling),
        shared_gate=None if kind.shared_gate is None else modules.linear(block, name, (kind.shared_gate,)),
    )


def _router(router: nn.Module, name: str) -> DecoderLinear:
    modules.without_hooks(router, name)
    weight, bias = getattr(router, "weight", None), getattr(router, "bias", None)
    if not isinstance(weight, Tensor) or bias is not None or not modules.of_transformers(router):
        raise Unsupported(f"{name} is a {type(router).__name__}, expected a router of transformers with a weight only")
    return DecoderLinear(((weight, None),))


def _setting(router: nn.Module, config: Any, name: str, key: str) -> Any:
    """What the router goes by; some versions of transformers keep it in the configuration only."""
    return getattr(router, name, getattr(config, key, None))
