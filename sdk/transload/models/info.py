"""ModelInfo: the dimensions of a language model, read from its config.json, without torch.

One value describes every family that Transload knows. Dimensions come from the config alone; a field that the config
lacks and that cannot be derived is named in the error, never guessed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from transload.errors import ConfigError
from transload.models.fields import Fields
from transload.models.vision import Vision, read_vision


class Attention(enum.Enum):
    """What a decoder layer keeps of the past, which decides its cache and its projections."""

    FULL = "full"  # keys and values of every token (MHA, GQA, MQA)
    SLIDING = "sliding"  # keys and values of the last `window` tokens
    MLA = "mla"  # one latent vector per token
    GDN = "gdn"  # gated delta net: a state of fixed size
    LIGHTNING = "lightning"  # lightning attention: a state of fixed size


@dataclass(frozen=True, slots=True)
class Mla:
    """Multi-head latent attention. q_lora is None where queries are projected in one step."""

    q_lora: int | None
    kv_lora: int
    nope: int
    rope: int
    v: int


@dataclass(frozen=True, slots=True)
class Indexer:
    """DeepSeek sparse attention's indexer. owners: which layers have one of their own."""

    heads: int
    dim: int
    owners: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Linear:
    """Linear attention. state_bytes: width of one number of the recurrent state, conv: kernel width (0: none)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv: int
    state_bytes: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts of a sparse layer. intermediate is one routed expert's width.

    shared: total width of the shared experts, 0 = none. shared_gate: the shared expert has a gate of its own [1, H].
    bias: the router has a correction bias per expert. router_bytes: width of a router weight in vLLM's memory.
    shared_whole: vLLM keeps the shared experts whole on each rank when experts and data are parallel together.
    """

    count: int
    per_token: int
    intermediate: int
    shared: int
    shared_gate: bool
    bias: bool
    router_bytes: int
    shared_whole: bool


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Dimensions of a decoder. attention and sparse have one entry a layer; heads are query heads.

    qk_norm: "none", "head" (one vector of head_dim for q and one for k) or "whole" (as wide as the projections).
    output_gate: q_proj is doubled, its second half gates the attention output. norms: RMSNorms of width hidden a layer.
    names: how the checkpoint calls its parts, see `Names`. quantization is config.json's quantization_config, or None.
    """

    family: str
    architecture: str
    layers: int
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    attention: tuple[Attention, ...]
    sparse: tuple[bool, ...]
    names: Names
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: str = "none"
    output_gate: bool = False
    norms: int = 2
    tied: bool = False
    window: int | None = None
    max_position: int | None = None
    dtype_bytes: int = 2
    mla: Mla | None = None
    indexer: Indexer | None = None
    linear: Linear | None = None
    experts: Experts | None = None
    mtp_layers: int = 0
    vision: Vision | None = None
    quantization: Mapping[str, object] | None = None

    @property
    def hybrid(self) -> bool:
        """True when some layers keep a state of fixed size instead of a cache."""
        return self.linear is not None


@dataclass(frozen=True, slots=True)
class Names:
    """Names in the checkpoint: `layers` + ".{i}." starts a layer; `moe` is the mixture's name inside a layer."""

    embed: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    head: str = "lm_head"
    moe: str = "mlp"


# model_type -> family. A family is a set of projections and rules, not a product name.
FAMILIES: Mapping[str, str] = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
    "qwen3_next": "qwen3_next",
    "qwen3_5": "qwen3_5",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5",
    "chatglm": "chatglm",
    "glm": "glm",
    "glm4": "glm4",
    "glm4_moe": "glm4_moe",
    "glm4_moe_lite": "deepseek",
    "glm_moe_dsa": "deepseek",
    "deepseek_v2": "deepseek",
    "deepseek_v3": "deepseek",
    "deepseek_v32": "deepseek",
    "kimi_k2": "deepseek",
    "kimi_k25": "deepseek",
    "minimax_m2": "minimax_m2",
    "bailing_hybrid": "bailing_v2_5",
    "bailing_moe_linear": "bailing_v2_5",
}


# Families whose q, k and v have a bias unless their config says otherwise (transformers 5.23 defaults).
_BIASED = ("qwen2", "glm", "glm4", "glm4_moe")


def read_model(config: Mapping[str, object], source: str = "config.json") -> ModelInfo:
    """The dimensions in a parsed config.json. source names the file in errors.

    Nested text configs (Qwen3.5, Kimi-K2.5) are followed. Raises ConfigError naming the missing or absurd field, or the
    families that are known when the model_type is not.
    """
    outer = Fields(config, source)
    inner = outer.inside("text_config") if isinstance(config.get("text_config"), Mapping) else outer
    model_type = inner.text("model_type", default=outer.text("model_type", default=""))
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ConfigError(f"{source}: model_type '{model_type or 'missing'}' is not known; known are {known}")
    quantization = config.get("quantization_config") or inner.values.get("quantization_config")
    return _model(inner, outer, family, model_type, quantization if isinstance(quantization, Mapping) else None)


def _model(
    f: Fields, outer: Fields, family: str, model_type: str, quantization: Mapping[str, object] | None
) -> ModelInfo:
    layers = f.count("num_hidden_layers", "num_layers")
    hidden, heads = f.count("hidden_size"), f.count("num_attention_heads")
    attention = _attention_kinds(f, family, layers)
    sparse = _sparse_layers(f, layers)
    architectures = outer.values.get("architectures") or f.values.get("architectures")
    return ModelInfo(
        family=family,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else model_type,
        layers=layers,
        hidden=hidden,
        vocab=f.count("padded_vocab_size", "vocab_size"),
        heads=heads,
        kv_heads=_kv_heads(f, heads),
        head_dim=_head_dim(f, attention, hidden, heads),
        intermediate=_dense_width(f, all(sparse)),
        attention=attention,
        sparse=sparse,
        names=_names(family, outer is not f, model_type),
        qkv_bias=f.flag("add_qkv_bias", "attention_bias", "use_qkv_bias", default=family in _BIASED),
        o_bias=family == "llama" and f.flag("attention_bias", default=False),
        qk_norm=_qk_norm(f, family),
        output_gate=family == "qwen3_next" or (family == "qwen3_5" and f.flag("attn_output_gate", default=True)),
        norms=4 if family == "glm4" else 2,
        tied=f.flag("tie_word_embeddings", default=outer.flag("tie_word_embeddings", default=False)),
        window=f.count("sliding_window") if Attention.SLIDING in attention else None,
        max_position=f.count("max_position_embeddings", "seq_length", default=0) or None,
        dtype_bytes=_dtype_bytes(f, outer),
        mla=_mla(f) if Attention.MLA in attention else None,
        indexer=_indexer(f, layers),
        linear=_linear(f, attention, heads),
        experts=_experts(f, family) if any(sparse) else None,
        mtp_layers=f.count("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules", default=0),
        vision=read_vision(outer),
        quantization=quantization,
    )


def _attention_kinds(f: Fields, family: str, layers: int) -> tuple[Attention, ...]:
    if family == "deepseek":
        return (Attention.MLA,) * layers
    if family == "bailing_v2_5":
        # The last, partial group of layers is full attention too (vLLM 0.32, bailing_moe_linear.py).
        group = f.count("layer_group_size")
        last = layers // group * group
        return tuple(Attention.MLA if (i + 1) % group == 0 or i >= last else Attention.LIGHTNING for i in range(layers))
    if family in ("qwen3_next", "qwen3_5"):
        interval = f.count("full_attention_interval", default=4)
        default = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
        words = {"full_attention": Attention.FULL, "linear_attention": Attention.GDN}
        return f.per_layer("layer_types", layers, words, default)
    if f.flag("use_sliding_window", default=False) and f.values.get("sliding_window"):
        first = f.count("max_window_layers", default=0)
        default = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
        words = {"full_attention": Attention.FULL, "sliding_attention": Attention.SLIDING}
        return f.per_layer("layer_types", layers, words, default)
    return (Attention.FULL,) * layers


def _sparse_layers(f: Fields, layers: int) -> tuple[bool, ...]:
    if not f.count("num_experts", "n_routed_experts", "num_local_experts", default=0):
        return (False,) * layers
    step = f.count("decoder_sparse_step", "moe_layer_freq", default=1)
    first = f.count("first_k_dense_replace", default=0)
    dense = set(f.integers("mlp_only_layers"))
    if f.text("model_type", default="").startswith("qwen"):
        default = ["sparse" if i not in dense and (i + 1) % step == 0 else "dense" for i in range(layers)]
    else:
        default = ["sparse" if i >= first and i % step == 0 else "dense" for i in range(layers)]
    return f.per_layer("mlp_layer_types", layers, {"sparse": True, "dense": False}, default)


def _kv_heads(f: Fields, heads: int) -> int:
    if "multi_query_group_num" in f.values:
        return f.count("multi_query_group_num") if f.flag("multi_query_attention", default=True) else heads
    return f.count("num_key_value_heads", default=0) or heads


def _head_dim(f: Fields, attention: tuple[Attention, ...], hidden: int, heads: int) -> int:
    given = f.count("kv_channels", "head_dim", default=0)
    if all(kind is Attention.MLA for kind in attention):
        return f.count("qk_nope_head_dim") + f.count("qk_rope_head_dim")
    return given or _quotient(f, hidden, heads)


def _quotient(f: Fields, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ConfigError(
            f"{f.source}: head_dim is missing and hidden_size {hidden} is not a multiple of {heads} heads"
        )
    return hidden // heads


def _dense_width(f: Fields, all_sparse: bool) -> int:
    if all_sparse:
        return f.count("intermediate_size", default=0)
    return f.count("ffn_hidden_size", "intermediate_size")


def _names(family: str, nested: bool, model_type: str) -> Names:
    if family == "chatglm":
        root = "transformer"
        return Names(
            f"{root}.embedding.word_embeddings",
            f"{root}.encoder.layers",
            f"{root}.encoder.final_layernorm",
            f"{root}.output_layer",
        )
    if nested and model_type.startswith("kimi"):
        root = "language_model"
        return Names(f"{root}.model.embed_tokens", f"{root}.model.layers", f"{root}.model.norm", f"{root}.lm_head")
    if nested:
        root = "model.language_model"
        return Names(f"{root}.embed_tokens", f"{root}.layers", f"{root}.norm")
    if family == "bailing_v2_5":
        return Names(embed="model.word_embeddings")
    return Names(moe="block_sparse_moe") if family == "minimax_m2" else Names()


def _qk_norm(f: Fields, family: str) -> str:
    if family in ("qwen3", "qwen3_moe", "qwen3_next", "qwen3_5"):
        return "head"
    if family == "glm4_moe":
        return "head" if f.flag("use_qk_norm", default=False) else "none"
    return "whole" if family == "minimax_m2" and f.flag("use_qk_norm", default=True) else "none"


def _dtype_bytes(f: Fields, outer: Fields) -> int:
    for source in (f, outer):
        name = source.text("dtype", default=source.text("torch_dtype", default=""))
        if name:
            return 4 if name.removeprefix("torch.") == "float32" else 2
    return 2


def _mla(f: Fields) -> Mla:
    q_lora = f.count("q_lora_rank", default=0) or None
    kv_lora, nope, rope = f.count("kv_lora_rank"), f.count("qk_nope_head_dim"), f.count("qk_rope_head_dim")
    return Mla(q_lora, kv_lora, nope, rope, f.count("v_head_dim"))


def _indexer(f: Fields, layers: int) -> Indexer | None:
    if "index_head_dim" not in f.values:
        return None
    owners = f.per_layer("indexer_types", layers, {"full": True, "shared": False}, ["full"] * layers)
    return Indexer(f.count("index_n_heads"), f.count("index_head_dim"), owners)


def _linear(f: Fields, attention: tuple[Attention, ...], heads: int) -> Linear | None:
    if Attention.GDN in attention:
        return Linear(
            f.count("linear_num_key_heads"),
            f.count("linear_num_value_heads"),
            f.count("linear_key_head_dim"),
            f.count("linear_value_head_dim"),
            f.count("linear_conv_kernel_dim"),
            4 if f.text("mamba_ssm_dtype", default="") == "float32" else 2,
        )
    if Attention.LIGHTNING in attention:
        dim = f.count("head_dim", default=0) or _quotient(f, f.count("hidden_size"), heads)
        return Linear(heads, heads, dim, dim, 0, 2)
    return None


def _experts(f: Fields, family: str) -> Experts:
    lite = f.text("model_type", default="") == "glm4_moe_lite"
    width = f.count("moe_intermediate_size", default=0) or f.count("intermediate_size")
    shared_count = f.count("n_shared_experts", "num_shared_experts", default=0)
    shared = f.count("shared_expert_intermediate_size", default=0) or shared_count * (
        f.count("moe_shared_expert_intermediate_size", default=0) or width
    )
    return Experts(
        count=f.count("num_experts", "n_routed_experts", "num_local_experts"),
        per_token=f.count("num_experts_per_tok"),
        intermediate=width,
        shared=shared,
        shared_gate=family in ("qwen3_next", "qwen3_5") and shared > 0,
        bias=family in ("glm4_moe", "minimax_m2", "bailing_v2_5", "deepseek"),
        router_bytes=4 if family in ("glm4_moe", "minimax_m2", "bailing_v2_5") or lite else 2,
        shared_whole=family in ("deepseek", "qwen3_next", "qwen3_5") and not lite,
    )
