"""Dimensions of a vision tower, from config.json's vision_config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transload.models.fields import Fields


@dataclass(frozen=True, slots=True)
class Vision:
    """A vision transformer and its projector into the language model.

    patch: numbers in one patch (channels x frames x height x width). positions: rows of the position table.
    merged: width of the merged patches that enter the projector. out: width of the language model.
    final_norm: the tower ends with a LayerNorm of its own. whole_projector: every rank has all of the projector.
    prefix: how the checkpoint calls the tower.
    """

    depth: int
    hidden: int
    intermediate: int
    heads: int
    patch: int
    positions: int
    merged: int
    out: int
    final_norm: bool
    whole_projector: bool
    prefix: str


def read_vision(outer: Fields) -> Vision | None:
    """The vision tower of a multimodal config, None for text models or towers of unknown shape.

    Understood are Qwen's towers (Qwen3-VL, Qwen3.5) and Kimi's MoonViT; the weights of other towers are counted from
    the checkpoint's headers only.
    """
    if not isinstance(outer.values.get("vision_config"), Mapping):
        return None
    f = outer.inside("vision_config")
    if outer.text("model_type", default="").startswith("kimi"):
        return _kimi(f)
    return _qwen(f) if "num_position_embeddings" in f.values else None


def _qwen(f: Fields) -> Vision:
    hidden, size = f.count("hidden_size"), f.count("patch_size")
    return Vision(
        depth=f.count("depth"),
        hidden=hidden,
        intermediate=f.count("intermediate_size"),
        heads=f.count("num_heads"),
        patch=f.count("in_channels", default=3) * f.count("temporal_patch_size", default=1) * size * size,
        positions=f.count("num_position_embeddings"),
        merged=hidden * f.count("spatial_merge_size", default=2) ** 2,
        out=f.count("out_hidden_size"),
        final_norm=False,
        whole_projector=False,
        prefix="model.visual",
    )


def _kimi(f: Fields) -> Vision:
    hidden, size = f.count("vt_hidden_size", "hidden_size"), f.count("patch_size")
    merge = f.integers("merge_kernel_size") or [2, 2]
    return Vision(
        depth=f.count("vt_num_hidden_layers", "num_hidden_layers"),
        hidden=hidden,
        intermediate=f.count("vt_intermediate_size", "intermediate_size"),
        heads=f.count("vt_num_attention_heads", "num_attention_heads"),
        patch=3 * size * size,
        positions=f.count("init_pos_emb_height") * f.count("init_pos_emb_width"),
        merged=hidden * merge[0] * merge[-1],
        out=f.count("text_hidden_size", "hidden_size"),
        final_norm=True,
        whole_projector=True,
        prefix="vision_tower",
    )
