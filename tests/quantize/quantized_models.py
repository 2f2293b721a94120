"""What the tests of whole models share: a tokenizer of bytes, text, and recipes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transload.quantize import QuantizeReport, Recipe, quantize


class Bytes:
    """A tokenizer for models with 80 tokens or more."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [b % 80 for b in text.encode()]}


def text_file(folder: Path, length: int = 3000) -> Path:
    """Text without much structure, the same every time."""
    file = folder / "calibration.txt"
    file.write_text("".join(chr(33 + (i * i * 7 + i // 3) % 90) for i in range(length)))
    return file


def recipe(scheme: str = "int4-g32", method: str = "gptq", **more: Any) -> Recipe:
    """One rule for every linear, calibrated with short windows."""
    calibration = {"samples": 24, "tokens": 32, "expert_tokens": 8} | more.pop("calibration", {})
    rules = more.pop("rules", [{"modules": ["*"], "scheme": scheme, "method": method}])
    return Recipe.model_validate({"name": "test", "rules": rules, "calibration": calibration, **more})


def run(source: Path, out: Path, made: Recipe | str, to: str = "transload", **more: Any) -> QuantizeReport:
    """`quantize` with the text and the tokenizer of this file."""
    if "calibration" not in more:
        more["calibration"] = text_file(out.parent)
    return quantize(source, out, made, to=to, tokenizer=Bytes(), **more)
