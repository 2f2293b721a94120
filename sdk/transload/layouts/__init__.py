"""Other layouts of a checkpoint: the names and fused members under which other code knows the same model."""

from __future__ import annotations

from pathlib import Path

from transload.errors import ConfigError
from transload.formats.base import Format, Source
from transload.layouts.view import Relaid
from transload.models import chatglm
from transload.models.chatglm_tokenizer import native_files

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


def _code(folder: Path) -> str | None:
    """The text of the publisher's code beside the weights; it is searched and never run."""
    file = folder / _CODE
    if not file.is_file() or file.stat().st_size > _MOST_CODE:
        return None
    return file.read_text(encoding="utf-8", errors="replace")


__all__ = ["LAYOUTS", "relaid"]
