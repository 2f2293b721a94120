"""The weights of a decoder layer, one row a linear: its size and how tensor parallelism cuts it.

Rows follow vLLM 0.32's model code (model_executor/models/*.py); vllm-ascend runs the same model code. Sizes are per
layer and unsharded; `ledger` turns them into bytes on a rank.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from transload.models.info import Attention, ModelInfo


class Part(enum.Enum):
    """What a weight is for: the lines of the ledger."""

    EMBEDDING = "embedding"
    HEAD = "output head"
    NORM = "norms"
    ATTENTION = "attention"
    ABSORBED = "absorbed MLA copies"
    INDEXER = "indexer"
    LINEAR = "linear attention"
    MLP = "dense MLP"
    ROUTER = "router"
    EXPERTS = "routed experts"
    SHARED = "shared experts"
    VISION = "vision tower"
    MTP = "MTP layers"
    OTHER = "other tensors"


class Cut(enum.Enum):
    """How tensor parallelism cuts a weight [N, K]."""

    WHOLE = "whole"  # every rank has all of it
    ROWS = "rows"  # column parallel: N / t
    COLUMNS = "columns"  # row parallel: K / t
    KV_ROWS = "kv rows"  # rows of key-value heads: at least one head a rank
    VOCABULARY = "vocabulary"  # rows padded to 64, then N / t


@dataclass(frozen=True, slots=True)
class Module:
    """One weight. heads: how many heads the cut must divide. width: bytes of a number when it is never quantized.

    fused: modules of one fused matmul of the engine share this name. experts: one of `experts` copies in the layer.
    """

    name: str
    part: Part
    n: int
    k: int
    cut: Cut = Cut.WHOLE
    heads: int = 0
    bias: bool = False
    quantizable: bool = True
    width: int = 2
    fused: str = ""
    experts: int = 1


def vector(name: str, part: Part, n: int, cut: Cut = Cut.WHOLE, heads: int = 0, width: int = 2) -> Module:
    """A tensor of n numbers that no recipe quantizes: a norm, a bias of a router, a decay."""
    return Module(name, part, n, 1, cut, heads, quantizable=False, width=width)


def layer_modules(m: ModelInfo, index: int) -> tuple[Module, ...]:
    """Every weight of decoder layer `index`, in the order of the checkpoint."""
    kind = m.attention[index]
    if kind is Attention.MLA:
        attention = _mla(m) + _indexer(m, index)
    elif kind is Attention.GDN:
        attention = _gdn(m)
    elif kind is Attention.LIGHTNING:
        attention = _lightning(m)
    else:
        attention = _attention(m)
    mlp = _sparse(m) if m.sparse[index] else _dense(m, Part.MLP, "mlp", m.intermediate)
    norms = tuple(vector(name, Part.NORM, m.hidden) for name in _NORMS[: m.norms])
    return attention + mlp + norms


_NORMS = ("input_layernorm", "post_attention_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm")


def _attention(m: ModelInfo) -> tuple[Module, ...]:
    q, kv, part = m.heads * m.head_dim, m.kv_heads * m.head_dim, Part.ATTENTION
    fused, bias = "qkv_proj", m.qkv_bias
    queries = q * 2 if m.output_gate else q
    modules: tuple[Module, ...] = (
        Module("self_attn.q_proj", part, queries, m.hidden, Cut.ROWS, m.heads, bias, fused=fused),
        Module("self_attn.k_proj", part, kv, m.hidden, Cut.KV_ROWS, m.kv_heads, bias, fused=fused),
        Module("self_attn.v_proj", part, kv, m.hidden, Cut.KV_ROWS, m.kv_heads, bias, fused=fused),
        Module("self_attn.o_proj", part, m.hidden, q, Cut.COLUMNS, m.heads, m.o_bias),
    )
    if m.qk_norm == "head":
        modules += tuple(vector(f"self_attn.{x}_norm", Part.NORM, m.head_dim) for x in "qk")
    if m.qk_norm == "whole":
        modules += (
            vector("self_attn.q_norm", Part.NORM, q, Cut.ROWS, m.heads),
            vector("self_attn.k_norm", Part.NORM, kv, Cut.KV_ROWS, m.kv_heads),
        )
    return modules


def _mla(m: ModelInfo) -> tuple[Module, ...]:
    assert m.mla is not None
    a, part, heads = m.mla, Part.ATTENTION, m.heads
    q_out = heads * (a.nope + a.rope)
    if a.q_lora is None:
        queries: tuple[Module, ...] = (Module("self_attn.q_proj", part, q_out, m.hidden, Cut.ROWS, heads),)
    else:
        queries = (
            Module("self_attn.q_a_proj", part, a.q_lora, m.hidden, fused="fused_qkv_a_proj"),
            vector("self_attn.q_a_layernorm", Part.NORM, a.q_lora),
            Module("self_attn.q_b_proj", part, q_out, a.q_lora, Cut.ROWS, heads),
        )
    fused = "fused_qkv_a_proj" if a.q_lora else ""
    return (
        *queries,
        Module("self_attn.kv_a_proj_with_mqa", part, a.kv_lora + a.rope, m.hidden, fused=fused),
        vector("self_attn.kv_a_layernorm", Part.NORM, a.kv_lora),
        Module("self_attn.kv_b_proj", part, heads * (a.nope + a.v), a.kv_lora, Cut.ROWS, heads),
        # W_UK_T and W_UV are built after loading and kept beside kv_b, always in 16 bits.
        Module("", Part.ABSORBED, heads * (a.nope + a.v), a.kv_lora, Cut.ROWS, heads, quantizable=False),
        Module("self_attn.o_proj", part, m.hidden, heads * a.v, Cut.COLUMNS, heads),
    )


def _indexer(m: ModelInfo, index: int) -> tuple[Module, ...]:
    if m.indexer is None or m.mla is None or not m.indexer.owners[index]:
        return ()
    x, part, lora = m.indexer, Part.INDEXER, m.mla.q_lora or m.hidden
    # vLLM fuses wk and weights_proj in bf16 whatever the checkpoint holds (deepseek_v2.Indexer).
    return (
        Module("self_attn.indexer.wq_b", part, x.heads * x.dim, lora),
        Module("self_attn.indexer.wk", part, x.dim, m.hidden, quantizable=False),
        Module("self_attn.indexer.weights_proj", part, x.heads, m.hidden, quantizable=False),
        vector("self_attn.indexer.k_norm", part, x.dim, width=4),
        vector("self_attn.indexer.k_norm.bias", part, x.dim, width=4),
    )


def _gdn(m: ModelInfo) -> tuple[Module, ...]:
    assert m.linear is not None
    x, part = m.linear, Part.LINEAR
    key, value = x.key_heads * x.key_dim, x.value_heads * x.value_dim
    if m.family == "qwen3_next":
        inputs: tuple[Module, ...] = (
            Module("linear_attn.in_proj_qkvz", part, 2 * key + 2 * value, m.hidden, Cut.ROWS, x.key_heads),
            Module("linear_attn.in_proj_ba", part, 2 * x.value_heads, m.hidden, Cut.ROWS, x.value_heads),
        )
    else:
        inputs = (
            Module("linear_attn.in_proj_qkv", part, 2 * key + value, m.hidden, Cut.ROWS, x.key_heads, fused="qkvz"),
            Module("linear_attn.in_proj_z", part, value, m.hidden, Cut.ROWS, x.value_heads, fused="qkvz"),
            Module("linear_attn.in_proj_b", part, x.value_heads, m.hidden, Cut.ROWS, x.value_heads, fused="ba"),
            Module("linear_attn.in_proj_a", part, x.value_heads, m.hidden, Cut.ROWS, x.value_heads, fused="ba"),
        )
    return (
        *inputs,
        Module("linear_attn.conv1d", part, 2 * key + value, x.conv, Cut.ROWS, x.key_heads, quantizable=False),
        vector("linear_attn.dt_bias", part, x.value_heads, Cut.ROWS, x.value_heads),
        vector("linear_attn.A_log", part, x.value_heads, Cut.ROWS, x.value_heads, width=4),
        vector("linear_attn.norm", part, x.value_dim),
        Module("linear_attn.out_proj", part, m.hidden, value, Cut.COLUMNS, x.value_heads),
    )


def _lightning(m: ModelInfo) -> tuple[Module, ...]:
    inner, part, heads = m.heads * m.head_dim, Part.LINEAR, m.heads
    return (
        Module("attention.query_key_value", part, 3 * inner, m.hidden, Cut.ROWS, heads, m.qkv_bias),
        Module("attention.g_proj", part, inner, m.hidden, Cut.ROWS, heads),
        Module("attention.dense", part, m.hidden, inner, Cut.COLUMNS, heads),
        vector("attention.query_layernorm", Part.NORM, m.head_dim),
        vector("attention.key_layernorm", Part.NORM, m.head_dim),
        vector("attention.g_norm", Part.NORM, inner, Cut.ROWS, heads),
    )


def _dense(m: ModelInfo, part: Part, name: str, width: int, experts: int = 1) -> tuple[Module, ...]:
    return (
        Module(f"{name}.gate_proj", part, width, m.hidden, Cut.ROWS, fused="gate_up_proj", experts=experts),
        Module(f"{name}.up_proj", part, width, m.hidden, Cut.ROWS, fused="gate_up_proj", experts=experts),
        Module(f"{name}.down_proj", part, m.hidden, width, Cut.COLUMNS, experts=experts),
    )


def _sparse(m: ModelInfo) -> tuple[Module, ...]:
    assert m.experts is not None
    x, moe = m.experts, m.names.moe
    router: tuple[Module, ...] = (
        Module(f"{moe}.gate", Part.ROUTER, x.count, m.hidden, quantizable=False, width=x.router_bytes),
    )
    if x.bias:
        router += (vector(f"{moe}.gate.e_score_correction_bias", Part.ROUTER, x.count, width=4),)
    if x.shared_gate:
        router += (Module(f"{moe}.shared_expert_gate", Part.ROUTER, 1, m.hidden, quantizable=False),)
    word = "shared_expert" if x.shared_gate else "shared_experts"
    shared = _dense(m, Part.SHARED, f"{moe}.{word}", x.shared) if x.shared else ()
    routed = _dense(m, Part.EXPERTS, f"{moe}.experts.{{e}}", x.intermediate, x.count)
    return router + shared + tuple(replace(r, fused=r.fused and "w13") for r in routed)


def mtp_modules(m: ModelInfo) -> tuple[Module, ...]:
    """The weights of one multi-token-prediction layer: a projection of two hidden states, norms and a decoder layer.

    The layer is of the last kind that caches tokens. Embedding and head are shared with the model. vLLM cuts Qwen's
    projection like a linear; that of the DeepSeek and GLM families is whole and never quantized (plain nn.Linear).
    """
    last = next(i for i in reversed(range(m.layers)) if m.attention[i] not in (Attention.GDN, Attention.LIGHTNING))
    body = tuple(replace(x, part=Part.MTP) for x in layer_modules(m, last))
    norms = tuple(vector(name, Part.MTP, m.hidden) for name in ("enorm", "hnorm", "shared_head.norm"))
    qwen = m.family in ("qwen3_next", "qwen3_5")
    cut = Cut.ROWS if qwen else Cut.WHOLE
    return (Module("eh_proj", Part.MTP, m.hidden, 2 * m.hidden, cut, quantizable=qwen), *norms, *body)


def end_modules(m: ModelInfo) -> tuple[Module, Module, Module]:
    """Embedding, final norm, output head."""
    return (
        Module("", Part.EMBEDDING, m.vocab, m.hidden, Cut.VOCABULARY, quantizable=False),
        vector("", Part.NORM, m.hidden),
        Module("", Part.HEAD, m.vocab, m.hidden, Cut.VOCABULARY),
    )


def vision_modules(m: ModelInfo) -> tuple[Module, ...]:
    """The vision tower and its projector, never quantized; empty for text models."""
    v = m.vision
    if v is None:
        return ()
    h, part = v.hidden, Part.VISION
    block = (
        Module("qkv", part, 3 * h, h, Cut.ROWS, v.heads, True, False),
        Module("proj", part, h, h, Cut.COLUMNS, v.heads, True, False),
        Module("fc1", part, v.intermediate, h, Cut.ROWS, 0, True, False),
        Module("fc2", part, h, v.intermediate, Cut.COLUMNS, 0, True, False),
        vector("norms", part, 4 * h),
    )
    ends = (
        Module("patch_embed", part, h, v.patch, bias=True, quantizable=False),
        vector("positions", part, v.positions * h),
        vector("projector norm", part, 2 * h),
        Module("projector in", part, v.merged, v.merged, Cut.WHOLE if v.whole_projector else Cut.ROWS, 0, True, False),
        Module("projector out", part, v.out, v.merged, Cut.WHOLE if v.whole_projector else Cut.COLUMNS, 0, True, False),
    )
    final = (vector("final norm", part, 2 * h),) if v.final_norm else ()
    return block * v.depth + ends + final
