"""A second count of weight bytes, tensor by tensor, written from the checkpoints' tensor lists and the engines' rules.

It shares nothing with transload.plan: a family is a list of tensors with a rule of how tensor parallelism cuts each of
them, and a rank's bytes are the sum over its own tensors, experts one by one. Slow and plain on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import ceil
from typing import Any

Config = dict[str, Any]


@dataclass(frozen=True)
class Tensor:
    """at: "embed", "norm", "head", "vision" or a layer's number. cut: rows, columns, kv, vocab, whole.

    kind: linear (what a recipe quantizes), f16 or f32. expert: its number, for routed experts. shared: shared experts.
    fused: tensors of one layer that the engine multiplies as one matrix, whose inputs have one order.
    """

    at: str | int
    n: int
    k: int
    cut: str = "whole"
    kind: str = "f16"
    heads: int = 0
    expert: int | None = None
    shared: bool = False
    fused: str = ""


def tensors(c: Config) -> Iterator[Tensor]:
    """Every tensor of a model by its config.json."""
    t = c.get("text_config", c)
    hidden, vocab = t["hidden_size"], t.get("padded_vocab_size") or t["vocab_size"]
    yield Tensor("embed", vocab, hidden, "vocab")
    for i in range(t.get("num_hidden_layers") or t["num_layers"]):
        yield from _mixer(t, i)
        yield from _mlp(t, i)
        for _ in range(4 if t["model_type"] == "glm4" else 2):
            yield Tensor(i, hidden, 1)
    yield Tensor("norm", hidden, 1)
    yield Tensor("head", vocab, hidden, "vocab")
    if "vision_config" in c:
        yield from _tower(c["vision_config"], c["model_type"])


def _mixer(t: Config, i: int) -> Iterator[Tensor]:
    kind = t["model_type"]
    if kind in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text") and (i + 1) % t.get("full_attention_interval", 4):
        yield from _delta_net(t, i)
    elif kind == "bailing_hybrid" and (i + 1) % t["layer_group_size"] and i < _whole_groups(t):
        yield from _lightning(t, i)
    elif "kv_lora_rank" in t:
        yield from _latent(t, i)
    else:
        yield from _heads(t, i)


def _whole_groups(t: Config) -> int:
    return t["num_hidden_layers"] - t["num_hidden_layers"] % t["layer_group_size"]


def _heads(t: Config, i: int) -> Iterator[Tensor]:
    kind, hidden, q = t["model_type"], t["hidden_size"], t["num_attention_heads"]
    kv = t.get("multi_query_group_num") or t["num_key_value_heads"]
    size = t.get("head_dim") or t.get("kv_channels") or hidden // q
    gate = 2 if kind.startswith(("qwen3_next", "qwen3_5")) else 1
    yield Tensor(i, q * size * gate, hidden, "rows", "linear", q, fused="qkv")
    yield Tensor(i, kv * size, hidden, "kv", "linear", kv, fused="qkv")
    yield Tensor(i, kv * size, hidden, "kv", "linear", kv, fused="qkv")
    yield Tensor(i, hidden, q * size, "columns", "linear", q)
    bias = {"qwen2": True, "glm": True, "chatglm": True, "glm4": True, "glm4_moe": True}.get(kind, False)
    if t.get("attention_bias", bias):
        yield Tensor(i, q * size, 1, "rows", heads=q)
        yield Tensor(i, kv * size, 1, "kv", heads=kv)
        yield Tensor(i, kv * size, 1, "kv", heads=kv)
    if kind == "minimax_m2":
        yield Tensor(i, q * size, 1, "rows", heads=q)
        yield Tensor(i, kv * size, 1, "kv", heads=kv)
    elif kind.startswith("qwen3") or (kind == "glm4_moe" and t.get("use_qk_norm")):
        yield Tensor(i, size, 1)
        yield Tensor(i, size, 1)


def _latent(t: Config, i: int) -> Iterator[Tensor]:
    hidden, q, lora = t["hidden_size"], t["num_attention_heads"], t["kv_lora_rank"]
    nope, rope, v = t["qk_nope_head_dim"], t["qk_rope_head_dim"], t["v_head_dim"]
    yield Tensor(i, t["q_lora_rank"], hidden, "whole", "linear", fused="qkv_a")
    yield Tensor(i, t["q_lora_rank"], 1)
    yield Tensor(i, q * (nope + rope), t["q_lora_rank"], "rows", "linear", q)
    yield Tensor(i, lora + rope, hidden, "whole", "linear", fused="qkv_a")
    yield Tensor(i, lora, 1)
    yield Tensor(i, q * (nope + v), lora, "rows", "linear", q)
    yield Tensor(i, q * nope, lora, "rows", heads=q)  # W_UK_T, built after loading
    yield Tensor(i, q * v, lora, "rows", heads=q)  # W_UV
    yield Tensor(i, hidden, q * v, "columns", "linear", q)
    if "index_head_dim" in t and t.get("indexer_types", ["full"] * (i + 1))[i] == "full":
        heads, dim = t["index_n_heads"], t["index_head_dim"]
        yield Tensor(i, heads * dim, t["q_lora_rank"], "whole", "linear")
        yield Tensor(i, dim, hidden)
        yield Tensor(i, heads, hidden)
        yield Tensor(i, dim, 1, kind="f32")
        yield Tensor(i, dim, 1, kind="f32")


def _delta_net(t: Config, i: int) -> Iterator[Tensor]:
    hidden, nk, nv = t["hidden_size"], t["linear_num_key_heads"], t["linear_num_value_heads"]
    key, value = nk * t["linear_key_head_dim"], nv * t["linear_value_head_dim"]
    if t["model_type"] == "qwen3_next":  # two tensors in the checkpoint
        yield Tensor(i, 2 * key + 2 * value, hidden, "rows", "linear", nk)
        yield Tensor(i, 2 * nv, hidden, "rows", "linear", nv)
    else:
        yield from (Tensor(i, rows, hidden, "rows", "linear", nk, fused="qkvz") for rows in (2 * key + value, value))
        yield from (Tensor(i, nv, hidden, "rows", "linear", nv, fused="ba") for _ in "ba")
    yield Tensor(i, 2 * key + value, t["linear_conv_kernel_dim"], "rows", heads=nk)
    yield Tensor(i, nv, 1, "rows", heads=nv)  # dt_bias
    yield Tensor(i, nv, 1, "rows", "f32", heads=nv)  # A_log
    yield Tensor(i, t["linear_value_head_dim"], 1)
    yield Tensor(i, hidden, value, "columns", "linear", nv)


def _lightning(t: Config, i: int) -> Iterator[Tensor]:
    hidden, q, size = t["hidden_size"], t["num_attention_heads"], t["head_dim"]
    yield from (Tensor(i, q * size, hidden, "rows", "linear", q, fused="qkv") for _ in "qkv")
    yield Tensor(i, q * size, hidden, "rows", "linear", q)  # gate
    yield Tensor(i, hidden, q * size, "columns", "linear", q)
    yield Tensor(i, size, 1)
    yield Tensor(i, size, 1)
    yield Tensor(i, q * size, 1, "rows", heads=q)


def _mlp(t: Config, i: int) -> Iterator[Tensor]:
    kind, hidden = t["model_type"], t["hidden_size"]
    count = t.get("num_experts") or t.get("n_routed_experts") or t.get("num_local_experts") or 0
    if not count or i < t.get("first_k_dense_replace", 0):
        width = t.get("ffn_hidden_size") or t["intermediate_size"]
        yield from (Tensor(i, width, hidden, "rows", "linear", fused="mlp") for _ in ("gate", "up"))
        yield Tensor(i, hidden, width, "columns", "linear")
        return
    width = t.get("moe_intermediate_size") or t["intermediate_size"]
    router = "f32" if kind in ("glm4_moe", "minimax_m2", "bailing_hybrid") else "f16"
    yield Tensor(i, count, hidden, kind=router)
    if not kind.startswith("qwen3"):
        yield Tensor(i, count, 1, kind="f32")  # correction bias
    shared = t.get("shared_expert_intermediate_size") or width * (
        t.get("n_shared_experts") or t.get("num_shared_experts") or 0
    )
    if kind.startswith(("qwen3_next", "qwen3_5")):
        yield Tensor(i, 1, hidden)
    if shared:
        yield from (Tensor(i, shared, hidden, "rows", "linear", shared=True, fused="shared") for _ in ("gate", "up"))
        yield Tensor(i, hidden, shared, "columns", "linear", shared=True)
    for e in range(count):
        yield from (Tensor(i, width, hidden, "rows", "linear", expert=e, fused="w13") for _ in ("gate", "up"))
        yield Tensor(i, hidden, width, "columns", "linear", expert=e)


def _tower(v: Config, kind: str) -> Iterator[Tensor]:
    kimi = kind == "kimi_k25"
    h = v["vt_hidden_size"] if kimi else v["hidden_size"]
    wide = v["vt_intermediate_size"] if kimi else v["intermediate_size"]
    heads = v["vt_num_attention_heads"] if kimi else v["num_heads"]
    for _ in range(v["vt_num_hidden_layers"] if kimi else v["depth"]):
        for _ in "qkv":
            yield from (Tensor("vision", h, h, "rows", heads=heads), Tensor("vision", h, 1, "rows", heads=heads))
        yield from (Tensor("vision", h, h, "columns", heads=heads), Tensor("vision", h, 1))
        yield from (Tensor("vision", wide, h, "rows"), Tensor("vision", wide, 1, "rows"))
        yield from (Tensor("vision", h, wide, "columns"), Tensor("vision", h, 1))
        yield from (Tensor("vision", h, 1) for _ in range(4))  # two LayerNorms
    patch = 3 * v["patch_size"] ** 2 * (1 if kimi else v["temporal_patch_size"])
    yield from (Tensor("vision", h, patch), Tensor("vision", h, 1))
    places = v["init_pos_emb_height"] * v["init_pos_emb_width"] if kimi else v["num_position_embeddings"]
    yield Tensor("vision", places, h)
    yield from (Tensor("vision", h, 1) for _ in range(4 if kimi else 2))  # projector's norm, Kimi's final norm
    merged = 4 * h
    out = v["text_hidden_size"] if kimi else v["out_hidden_size"]
    yield from (Tensor("vision", merged, merged, "whole" if kimi else "rows"),)
    yield from (Tensor("vision", merged, 1, "whole" if kimi else "rows"),)
    yield from (Tensor("vision", out, merged, "whole" if kimi else "columns"), Tensor("vision", out, 1))


# What each pipeline stage holds beside its layers in vLLM 0.32, where that is not "embedding first, head last".
EVERYWHERE = {
    "chatglm": {"embed", "norm", "head"}, "qwen3_moe": {"embed", "norm", "head"}, "qwen3_next": {"embed", "head"},
    "qwen3_5_moe_text": {"embed", "vision"}, "qwen3_5_text": {"embed", "vision"}, "kimi_k2": {"vision"},
}  # fmt: skip
SHARED_WHOLE = ("deepseek_v3", "glm_moe_dsa", "kimi_k2", "qwen3_next", "qwen3_5_moe_text")


@cache
def bits(form: str, platform: str, n: int, k: int) -> dict[str, int]:
    """Bits of every tensor that an engine holds for a linear [n, k]. form: bf16, int4-32, awq-64, gptq-64, fp8, ..."""
    name, _, size = form.partition("-")
    group = int(size or 0) or k
    groups = ceil(k / group)
    found = {"codes": n * k * {"bf16": 16, "fp8": 8, "w8a8": 8}.get(name, 4)}
    if name in ("int4", "awq", "gptq"):
        found["scales"] = 16 * n * groups
    if name == "awq":
        found["zeros"] = 4 * n * groups
    if name == "int4" and platform == "ascend":
        found["offsets"] = 16 * n * groups
    if name == "gptq":  # act-order: the group of every input, and the order that sorts them
        found["g_idx"] = found["order"] = 32 * k
    if name == "fp8":
        found["scales"] = 32 * ceil(n / 128) * ceil(k / 128)
    if name == "nvfp4":
        found |= {"scales": 8 * n * k // 16, "global": 32}
    if name == "mxfp4":
        found["scales"] = 8 * n * k // 32
    if name == "w8a8":
        found |= {"scales": 16 * n, "float scales": 32 * n, "offsets": 16 * n}
    if name == "w4a8":
        found |= {"scales": 64 * n, "scale_bias": 32 * n}
    return found


def rank_bytes(
    c: Config, every: list[Tensor], forms: tuple[str, str], platform: str, shape: tuple[int, int, int, bool], rank: int
) -> int:
    """Bytes of one rank. every: list(tensors(c)). forms: of linears and of routed experts. shape: TP, PP, DP, EP.

    Ranks count DP outermost, then PP, then TP.
    """
    tp, pp, dp, ep = shape
    mine, stage, replica = rank % tp, rank // tp % pp, rank // (tp * pp)
    t = c.get("text_config", c)
    kind, layers = t["model_type"], t.get("num_hidden_layers") or t["num_layers"]
    count = t.get("num_experts") or t.get("n_routed_experts") or t.get("num_local_experts") or 0
    owner = _owners(count, tp * dp) if ep and count else {}
    own_layers, total = _stages(layers, pp)[stage], 0
    tied = t.get("tie_word_embeddings", c.get("tie_word_embeddings", False))
    ordered: set[tuple[object, ...]] = set()
    for x in every:
        if isinstance(x.at, int):
            if x.at not in own_layers:
                continue
        elif not _holds(x.at, stage, pp, EVERYWHERE.get(kind, set()), tied):
            continue
        if x.expert is not None and ep and owner[x.expert] != replica * tp + mine:
            continue
        ways = tp if x.expert is None else 1 if ep else tp * dp
        if x.shared and ep and tp > 1 and dp > 1 and kind in SHARED_WHOLE and platform != "ascend":
            ways = 1
        form = {"linear": forms[x.expert is not None], "f16": "bf16"}.get(x.kind, "f32")
        n, k = _piece(x, ways)
        held = {"numbers": 32 * n * k} if form == "f32" else bits(form, platform, n, k)
        if x.fused and (x.at, x.fused, x.expert) in ordered:
            held = {name: size for name, size in held.items() if name not in ("g_idx", "order")}
        ordered.add((x.at, x.fused, x.expert))
        total += sum(held.values()) // 8
    return total


def _piece(x: Tensor, ways: int) -> tuple[int, int]:
    if x.cut == "vocab":
        rows = x.n
        while rows % 64:
            rows += 1
        return rows // ways, x.k
    if x.cut == "kv":
        heads = [h for h in range(x.heads) if h * ways // x.heads == 0] if ways <= x.heads else [0]
        return x.n // x.heads * len(heads), x.k
    if x.cut == "rows":
        assert x.n % ways == 0
        return x.n // ways, x.k
    if x.cut == "columns":
        assert x.k % ways == 0
        return x.n, x.k // ways
    return x.n, x.k


def _owners(count: int, ranks: int) -> dict[int, int]:
    """Expert -> rank: consecutive experts, the first ranks one more where they do not divide."""
    owner, expert = {}, 0
    for rank in range(ranks):
        for _ in range(count // ranks + (1 if rank < count % ranks else 0)):
            owner[expert] = rank
            expert += 1
    return owner


def _stages(layers: int, stages: int) -> list[range]:
    """vLLM's default: equal shares, the rest one each to the stages before the last, going backwards."""
    sizes, rest, at = [layers // stages] * stages, layers % stages, stages - 2
    while rest:
        sizes[at] += 1
        at, rest = at - 1, rest - 1
    starts = [sum(sizes[:s]) for s in range(stages)]
    return [range(a, a + size) for a, size in zip(starts, sizes, strict=True)]


def _holds(at: str, stage: int, stages: int, everywhere: set[str], tied: bool) -> bool:
    first, last = stage == 0, stage == stages - 1
    if at == "head":
        return (last or "head" in everywhere) and not (tied and (first or "embed" in everywhere))
    return at in everywhere or {"embed": first, "vision": first, "norm": last}[at]
