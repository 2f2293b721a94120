"""ChatGLM2, ChatGLM3 and GLM-4-9b: the layout of their own code, and transformers' `glm` for the same model.

    transformer.encoder.layers.0.self_attention.query_key_value   q rows, then k rows, then v rows, with a bias
    transformer.encoder.layers.0.mlp.dense_h_to_4h                gate rows, then up rows
    transformer.output_layer                                      the head; never tied

Both compute RMSNorm, grouped queries, rotary positions on the first half of each head in neighbouring pairs, and
silu(gate) * up. Where a configuration says anything else, the model is not the same one and a sentence says why.
Source: modeling_chatglm.py of chatglm2-6b, chatglm3-6b and glm-4-9b-chat; `models/glm/modeling_glm.py` of transformers
5.23; tests compute both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from transload.errors import ConfigError, Unsupported
from transload.models.fields import Fields
from transload.models.relayout import Frequencies, Relayout, Rows

Config = Mapping[str, object]

REMOTE, NATIVE = "chatglm", "glm"  # model_type
_BASE = 10000.0  # of rotary positions, before rope_ratio
_INV_FREQ = "transformer.rotary_pos_emb.inv_freq"
_MOST_HEADS = 4096
_END_OF_TEXT = {65024: 2}  # padded vocabulary -> end token, where ChatGLM2's config.json has none

# Fields of modeling_chatglm.py that have one value in every model that `glm` computes, and what another would mean.
_FIXED: tuple[tuple[str, bool, str], ...] = (
    ("rmsnorm", True, "it normalizes with LayerNorm"),
    ("post_layer_norm", True, "it has no norm after the last layer"),
    ("original_rope", True, "it rotates halves of a head instead of neighbouring pairs"),
    ("apply_residual_connection_post_layernorm", False, "its residuals start after the norm"),
    ("add_bias_linear", False, "every linear of it has a bias"),
)
# Fields that both have, by ChatGLM's name and transformers'.
_SIZES = (
    ("padded_vocab_size", "vocab_size"),
    ("hidden_size", "hidden_size"),
    ("ffn_hidden_size", "intermediate_size"),
    ("num_layers", "num_hidden_layers"),
    ("num_attention_heads", "num_attention_heads"),
)
_RENAMED = (
    *_SIZES,
    ("multi_query_group_num", "num_key_value_heads"),
    ("kv_channels", "head_dim"),
    ("seq_length", "max_position_embeddings"),
    ("layernorm_epsilon", "rms_norm_eps"),
    ("add_qkv_bias", "attention_bias"),
    ("attention_dropout", "attention_dropout"),
)
_DEFAULTS = {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}  # of ChatGLM's configuration class
_CARRIED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "dtype", "torch_dtype", "quantization_config",
    "compression_config",
)  # fmt: skip


def to_native(config: Config, source: str, code: str | None) -> Relayout:
    """transformers' `glm` layout of a ChatGLM checkpoint.

    source names the checkpoint in errors. code: the text of the modeling_chatglm.py beside the weights, None without
    one; it is read for one fact and never run. Raises Unsupported with the reasons when `glm` computes another model.
    """
    f = Fields(config, f"{source}/config.json")
    reasons = list(_not_native(f))
    if reasons:
        raise Unsupported(f"{source}: transformers' 'glm' cannot compute this ChatGLM model: {'; '.join(reasons)}")
    heads, width = f.count("num_attention_heads"), f.count("kv_channels")
    groups = f.count("multi_query_group_num") if f.flag("multi_query_attention", default=False) else heads
    native: dict[str, object] = {"architectures": ["GlmForCausalLM"], "model_type": NATIVE}
    native |= _DEFAULTS | {theirs: config[ours] for ours, theirs in _RENAMED if ours in config}
    native |= {theirs: f.count(ours) for ours, theirs in _SIZES}
    native |= {
        "num_key_value_heads": groups,
        "hidden_act": "silu",
        "attention_bias": f.flag("add_qkv_bias", default=False),
    }
    native |= _rope(f, source, code)
    native |= {name: config[name] for name in _CARRIED if name in config}
    native.setdefault("pad_token_id", None)  # the default of `glm` lies outside ChatGLM2's vocabulary
    if native.get("eos_token_id") is None and f.count("padded_vocab_size") in _END_OF_TEXT:
        native["eos_token_id"] = _END_OF_TEXT[f.count("padded_vocab_size")]
    native["tie_word_embeddings"] = f.flag("tie_word_embeddings", default=False)
    grouped = f.flag("multi_query_attention", default=False)
    sizes = tuple(f.count(name) for name in ("padded_vocab_size", "hidden_size", "ffn_hidden_size"))
    modules = dict(_native_modules(f.count("num_layers"), sizes, heads, groups, width, grouped))
    biased = native["attention_bias"] is True
    return Relayout(
        config=native,
        modules=modules,
        biased=frozenset(name for name in modules if biased and name.endswith(("q_proj", "k_proj", "v_proj"))),
        dropped={_INV_FREQ: "the model computes it from rope_theta"},
        notes=("layout: transformers' GlmForCausalLM, which runs without remote code",),
    )


def to_remote(config: Config, source: str) -> Relayout:
    """The layout of modeling_chatglm.py for a checkpoint of `glm`. Raises Unsupported with the reasons."""
    f = Fields(config, f"{source}/config.json")
    rope = f.inside("rope_parameters") if isinstance(config.get("rope_parameters"), Mapping) else f
    reasons = list(_not_remote(f, rope))
    if reasons:
        raise Unsupported(f"{source}: ChatGLM's own code cannot compute this model: {'; '.join(reasons)}")
    groups, width = f.count("num_key_value_heads"), _head_dim(f)
    ratio = _number(rope, "rope_theta", _BASE) / _BASE
    remote: dict[str, object] = {"architectures": ["ChatGLMModel"], "model_type": REMOTE}
    remote |= {ours: config[theirs] for ours, theirs in _RENAMED if theirs in config}
    remote |= {name: value for name, value, _ in _FIXED}
    remote |= {"multi_query_attention": True, "multi_query_group_num": groups, "kv_channels": width}
    remote |= {"add_qkv_bias": f.flag("attention_bias", default=True), "tie_word_embeddings": False}
    remote |= {
        "rope_ratio": int(ratio) if ratio == int(ratio) else ratio,
        "num_hidden_layers": config["num_hidden_layers"],
    }
    remote |= {"hidden_dropout": 0.0, "apply_query_key_layer_scaling": True, "attention_softmax_in_fp32": True}
    remote |= {"fp32_residual_connection": False, "bias_dropout_fusion": True, "vocab_size": config["vocab_size"]}
    remote |= {name: config[name] for name in _CARRIED if name in config}
    modules = dict(_remote_modules(f.count("num_hidden_layers")))
    note = (
        "layout: ChatGLM's own; vLLM loads it as it is, transformers needs the publisher's "
        "configuration_chatglm.py and modeling_chatglm.py beside it"
    )
    dtype = f.text("dtype", default=f.text("torch_dtype", default="float32"))
    biased = remote["add_qkv_bias"] is True
    return Relayout(
        config=remote,
        modules=modules,
        biased=frozenset(name for name in modules if biased and name.endswith("query_key_value")),
        dropped={},
        made=Frequencies(_INV_FREQ, _BASE, width // 2, dtype),
        notes=(note,),
    )


def _not_native(f: Fields) -> Iterator[str]:
    """Everything in a ChatGLM configuration that transformers' `glm` would not compute."""
    if "position_encoding_2d" in f.values or "inner_hidden_size" in f.values:
        yield "it is of the first generation (ChatGLM-6B), with two-dimensional positions, LayerNorm and GELU"
        return
    if isinstance(f.values.get("vision_config"), Mapping):
        yield "it has a vision tower (GLM-4V), and 'glm' reads text"
    if f.count("pre_seq_len", default=0):
        yield "it has a trained prefix (P-tuning, pre_seq_len)"
    if f.count("quantization_bit", default=0):
        yield "its weights are in ChatGLM's own quantization (quantization_bit), which no format here reads"
    for name, wanted, meaning in _FIXED:
        if f.flag(name, default=wanted) is not wanted:
            yield f"{meaning} ({name})"
    if f.count("num_attention_heads") > _MOST_HEADS:
        yield f"it says that it has {f.count('num_attention_heads')} heads"
    if f.count("kv_channels") % 4:
        yield f"half of its heads of {f.count('kv_channels')} is no whole number of pairs"


def _not_remote(f: Fields, rope: Fields) -> Iterator[str]:
    model_type = f.text("model_type", default="")
    if model_type == "glm4":
        yield "'glm4' (GLM-4-0414) has two more norms in every layer"
    elif model_type != NATIVE:
        yield f"model_type is '{model_type}', and the layout belongs to 'glm'"
    if _number(rope, "partial_rotary_factor", _number(f, "partial_rotary_factor", 0.5)) != 0.5:
        yield "it rotates another part of a head than the first half (partial_rotary_factor)"
    if rope.text("rope_type", default="default") != "default" or f.values.get("rope_scaling"):
        yield "its rotary positions are scaled (rope_scaling)"
    if f.text("hidden_act", default="silu") != "silu":
        yield f"its activation is {f.text('hidden_act', default='')}"
    if f.flag("tie_word_embeddings", default=False):
        yield "its head is tied to the embedding"


def _rope(f: Fields, source: str, code: str | None) -> dict[str, object]:
    """Rotary positions: rope_ratio widens the base, except in ChatGLM2-6B-32K, whose code divides positions by it."""
    ratio = _number(f, "rope_ratio", 1.0)
    rope: dict[str, object] = {"rope_theta": _BASE, "partial_rotary_factor": 0.5}
    if ratio == 1.0:
        return rope
    if f.count("padded_vocab_size") not in _END_OF_TEXT or (code is not None and "base * self.rope_ratio" in code):
        return rope | {"rope_theta": _BASE * ratio}
    if code is not None and "/ self.rope_ratio" in code:
        return rope | {"rope_scaling": {"rope_type": "linear", "factor": ratio}}
    raise Unsupported(
        f"{source}: rope_ratio {ratio:g} divides positions in ChatGLM2-6B-32K and widens the base in ChatGLM3; only "
        "the publisher's modeling_chatglm.py tells which this is: put that file beside the weights (it is never run)"
    )


def _native_modules(
    layers: int, sizes: tuple[int, ...], heads: int, groups: int, width: int, grouped: bool
) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    """Every module with the number of rows that the configuration gives it. sizes: vocabulary, hidden, intermediate."""
    vocabulary, hidden, intermediate = sizes
    yield "model.embed_tokens", (Rows("transformer.embedding.word_embeddings", 0, vocabulary),)
    for i in range(layers):
        old, new = f"transformer.encoder.layers.{i}", f"model.layers.{i}"
        qkv = f"{old}.self_attention.query_key_value"
        for name, rows in zip("qkv", _qkv_rows(qkv, heads, groups, width, grouped), strict=True):
            yield f"{new}.self_attn.{name}_proj", rows
        yield f"{new}.self_attn.o_proj", (Rows(f"{old}.self_attention.dense", 0, hidden),)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{new}.{norm}", (Rows(f"{old}.{norm}", 0, hidden),)
        yield f"{new}.mlp.gate_up_proj", (Rows(f"{old}.mlp.dense_h_to_4h", 0, 2 * intermediate),)
        yield f"{new}.mlp.down_proj", (Rows(f"{old}.mlp.dense_4h_to_h", 0, hidden),)
    yield "model.norm", (Rows("transformer.encoder.final_layernorm", 0, hidden),)
    yield "lm_head", (Rows("transformer.output_layer", 0, vocabulary),)


def _qkv_rows(name: str, heads: int, groups: int, width: int, grouped: bool) -> Iterator[tuple[Rows, ...]]:
    """The rows of q, k and v in query_key_value: one block each, or (not grouped) q, k and v of each head in turn."""
    if grouped:
        start = 0
        for rows in (heads * width, groups * width, groups * width):
            yield (Rows(name, start, start + rows),)
            start += rows
    else:
        for part in range(3):
            yield tuple(Rows(name, (3 * h + part) * width, (3 * h + part + 1) * width) for h in range(heads))


def _remote_modules(layers: int) -> Iterator[tuple[str, tuple[Rows, ...]]]:
    yield "transformer.embedding.word_embeddings", (Rows("model.embed_tokens"),)
    for i in range(layers):
        old, new = f"model.layers.{i}", f"transformer.encoder.layers.{i}"
        yield f"{new}.self_attention.query_key_value", tuple(Rows(f"{old}.self_attn.{x}_proj") for x in "qkv")
        yield f"{new}.self_attention.dense", (Rows(f"{old}.self_attn.o_proj"),)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"{new}.{norm}", (Rows(f"{old}.{norm}"),)
        yield f"{new}.mlp.dense_h_to_4h", (Rows(f"{old}.mlp.gate_up_proj"),)
        yield f"{new}.mlp.dense_4h_to_h", (Rows(f"{old}.mlp.down_proj"),)
    yield "transformer.encoder.final_layernorm", (Rows("model.norm"),)
    yield "transformer.output_layer", (Rows("lm_head"),)


def _head_dim(f: Fields) -> int:
    return f.count("head_dim", default=0) or f.count("hidden_size") // f.count("num_attention_heads")


def _number(f: Fields, name: str, default: float) -> float:
    value = f.values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{f.source}: '{name}' is {value!r:.40}, expected a positive number")
    return float(value)
