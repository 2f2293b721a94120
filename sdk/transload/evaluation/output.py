"""Where the report goes: checked before hours of work, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from transload.errors import ConfigError, OutputExists
from transload.evaluation.page import page
from transload.evaluation.result import EvalReport


def check_free(path: Path | None, overwrite: bool) -> None:
    """Raises OutputExists or ConfigError when a report could not be written to `path` in the end."""
    if path is None:
        return
    if path.exists() and not overwrite:
        raise OutputExists(f"{path} exists: give --overwrite to replace it, or another name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path}: {path.parent} is not a folder that can be written to")
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise ConfigError("the HTML report needs matplotlib: pip install 'transload[report]'") from e


def write_page(report: EvalReport, path: Path, broken: Sequence[str], limits: int) -> None:
    """Writes the HTML report through a temporary file beside it."""
    partial = path.with_name(f".{path.name}.part")
    partial.write_text(page(report, broken, limits), encoding="utf-8")
    partial.replace(path)
