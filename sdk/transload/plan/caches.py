"""Which cache every layer of a model keeps on one rank: bytes per token or per state, by attention kind and engine."""

from __future__ import annotations

from transload.models.info import Attention, ModelInfo
from transload.plan.engines import Engine
from transload.plan.kv import Cache, Keeps, align_state
from transload.plan.shapes import Shape
from transload.plan.workload import Workload

_WIDTH = {"bf16": 2, "fp8": 1, "int8": 1}
# FlashMLA's packed rows of DeepSeek sparse attention: 512 fp8 + 16 scale + 64 bf16 values.
_SPARSE_FP8_ROW = 656


def layer_caches(info: ModelInfo, shape: Shape, engine: Engine, workload: Workload) -> dict[str, Cache]:
    """Layer name -> cache on one tensor-parallel rank, for the whole model, in layer order.

    MTP layers cache like the last attention layer. On CUDA an indexer is a layer of its own; on Ascend its keys are
    part of the layer's row (planner formulas: 132 B and 1408 B a token for GLM-5).
    """
    block = engine.block_for(info)
    state = _state(info, shape, workload)
    if state is not None:
        cached = next(k for k in info.attention if k not in (Attention.GDN, Attention.LIGHTNING))
        row = _token_bytes(info, 0, cached, shape, engine, workload)
        block, page = align_state(state, block, row, cached is Attention.MLA)
        states = Cache(Keeps.STATE, block if workload.prefix_caching else workload.context, 0, 0, state, padded=page)
    out: dict[str, Cache] = {}
    kinds: list[tuple[int, Attention]] = [*enumerate(info.attention)]
    if workload.speculative_tokens and info.mtp_layers:
        drafts = next(k for k in reversed(info.attention) if k not in (Attention.GDN, Attention.LIGHTNING))
        kinds += [(info.layers + i, drafts) for i in range(info.mtp_layers)]
    for i, kind in kinds:
        if kind in (Attention.GDN, Attention.LIGHTNING):
            out[f"layers.{i}"] = states
            continue
        row = _token_bytes(info, min(i, info.layers - 1), kind, shape, engine, workload)
        keeps = Keeps.WINDOW if kind is Attention.SLIDING else Keeps.TOKENS
        out[f"layers.{i}"] = Cache(keeps, block, row, info.window or 0, latent=kind is Attention.MLA)
        if info.indexer is not None and engine.platform != "ascend" and _owns_indexer(info, i):
            keys = info.indexer.dim + -(-info.indexer.dim // 128) * 4
            out[f"layers.{i}.indexer"] = Cache(Keeps.TOKENS, block, keys, latent=True)
    return out


def _owns_indexer(info: ModelInfo, index: int) -> bool:
    return info.indexer is not None and info.indexer.owners[min(index, info.layers - 1)]


def _token_bytes(info: ModelInfo, index: int, kind: Attention, shape: Shape, engine: Engine, workload: Workload) -> int:
    """Bytes that a token takes in one layer. MLA is not divided by TP; key-value heads are, down to one a rank."""
    width = _WIDTH[workload.kv_dtype]
    if kind is not Attention.MLA:
        return max(1, info.kv_heads // shape.tp) * 2 * info.head_dim * width
    assert info.mla is not None
    row = (info.mla.kv_lora + info.mla.rope) * width
    if info.indexer is None:
        return row
    if engine.platform == "ascend":
        # LI-C8 (8-bit keys of the indexer, with a 16-bit scale) is what an 8-bit cache means there.
        keys = info.indexer.dim * 2 if width == 2 else info.indexer.dim + 2
        latent = (info.mla.kv_lora + info.mla.rope) * 2
        return latent + (keys if _owns_indexer(info, index) else 0)
    return _SPARSE_FP8_ROW if width == 1 else row


def _state(info: ModelInfo, shape: Shape, workload: Workload) -> int | None:
    """Bytes of one recurrent state on a rank, None for models without (mamba_utils.gated_delta_net_state_shape)."""
    x = info.linear
    if x is None:
        return None
    recurrent = x.value_heads * x.value_dim * x.key_dim // shape.tp * x.state_bytes
    if x.conv == 0:
        return recurrent
    channels = 2 * x.key_heads * x.key_dim + x.value_heads * x.value_dim
    return recurrent + channels // shape.tp * (x.conv - 1 + workload.speculative_tokens) * 2
