"""What differs between the decoders of transformers that one call per token can compute: data, one line a family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mixture:
    """How a family's mixture of experts differs from others.

    block: its class. sigmoid: scores are sigmoids, else a softmax. shared: the member that every token passes, and
    shared_gate the one that weighs it. always_normalized: weights of the chosen add up to 1 whatever the settings.
    """

    block: str
    sigmoid: bool = False
    shared: str | None = None
    shared_gate: str | None = None
    always_normalized: bool = False


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between decoders: neighbours turned as pairs, the norms behind attention and MLP, experts.

    windows: "none", "config" (one for all layers), or "layer" (each attention module has its own).
    """

    windows: str = "none"
    interleaved: bool = False
    after_attention: str | None = None
    after_mlp: str | None = None
    mixture: Mixture | None = None


_QWEN2_MOE = Mixture("Qwen2MoeSparseMoeBlock", shared="shared_expert", shared_gate="shared_expert_gate")

# transformers' model class -> what is special about it. All have root-mean-square norms and SiLU gates.
FAMILIES = {
    "LlamaModel": Family(),
    "MistralModel": Family("config"),
    "MixtralModel": Family("config", mixture=Mixture("MixtralSparseMoeBlock", always_normalized=True)),
    "Qwen2Model": Family("layer"),
    "Qwen2MoeModel": Family("layer", mixture=_QWEN2_MOE),
    "Qwen3Model": Family("layer"),
    "Qwen3MoeModel": Family("layer", mixture=Mixture("Qwen3MoeSparseMoeBlock")),
    "Phi3Model": Family("config"),
    "GlmModel": Family(interleaved=True),
    "Glm4Model": Family("none", True, "post_self_attn_layernorm", "post_mlp_layernorm"),
    "Glm4MoeModel": Family(mixture=Mixture("Glm4MoeMoE", sigmoid=True, shared="shared_experts")),
}
