"""Published configurations for the planner's tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parents[1] / "golden" / "plan" / "configs"


def config(name: str) -> dict[str, Any]:
    """config.json of a published model, without its quantization (tests name a recipe)."""
    data: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    for part in (data, data.get("text_config", {})):
        part.pop("quantization_config", None)
    return data
