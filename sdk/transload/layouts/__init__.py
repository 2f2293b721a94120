"""Other layouts of a checkpoint: the names and fused members under which other code knows the same model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from transload.errors import ConfigError
from transload.formats.base import Format, Source
from transload.headers.info import shown
from transload.layouts.view import Relaid
from transload.models import chatglm
from transload.models.chatglm_tokenizer import native_files
from transload.models.info import FAMILIES

LAYOUTS = ("stored", "native", "remote")
_CODE = "modeling_chatglm.py"
_MOST_CODE = 1 << 20  # bytes; the real ones have about 60 kB


def relaid(source: Source, format: Format, layout: str) -> Format:
    """The format to read a source by in a layout: itself, or a view of it.

    layout: "stored" (as it is), "native" (what transformers' own classes load) or "remote" (ChatGLM's own code).
    Raises ConfigError for an unknown layout, Unsupported with the reasons when the layout would be another model.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"layout '{layout}': give one of {', '.join(LAYOUTS)}")
    config = format.config(source)
    model_type = config.get("model_type")
    if layout == "native" and model_type == chatglm.REMOTE:
        folder = source.path if source.path.is_dir() else source.path.parent
        relayout = chatglm.to_native(config, str(source.path), _code(folder))
        return Relaid(format, source, relayout, lambda: native_files(folder))
    if layout == "remote" and model_type != chatglm.REMOTE:
        return Relaid(format, source, chatglm.to_remote(config, str(source.path)), dict)
    return format


def hints(config: Mapping[str, object]) -> list[str]:
    """What a report says about a model's layout: another one that exists, or that nothing is known about it."""
    nested = config.get("text_config")
    inner = nested.get("model_type") if isinstance(nested, Mapping) else None
    types = [t for t in (config.get("model_type"), inner) if isinstance(t, str)]
    if chatglm.REMOTE in types and "GlmForCausalLM" not in str(config.get("architectures")):
        return [
            "layout: ChatGLM's own, for which transformers needs remote code; `port --layout native` gives one without"
        ]
    if types and not any(t in FAMILIES for t in types):
        return [f"model_type {shown(types[0])} is not known here: every name and shape is carried as it is stored"]
    return []


def _code(folder: Path) -> str | None:
    """The text of the publisher's code beside the weights; it is searched and never run."""
    file = folder / _CODE
    if not file.is_file() or file.stat().st_size > _MOST_CODE:
        return None
    return file.read_text(encoding="utf-8", errors="replace")


__all__ = ["LAYOUTS", "hints", "relaid"]
