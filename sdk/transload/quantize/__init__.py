"""Quantizing: recipes, methods as pure maths, calibration layer by layer, and the same targets as a port.

    import transload
    report = transload.quantize("Qwen3-8B", "Qwen3-8B-int4", "int4-g128", to="vllm")

The package itself can be called, so that `transload.quantize(...)` works whether or not its modules are imported.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transload.quantize.imported import import_recipe
    from transload.quantize.recipe import Recipe, read_recipe, shipped
    from transload.quantize.report import QuantizeReport
    from transload.quantize.run import Progress, quantize

_HOMES = {
    "QuantizeReport": "transload.quantize.report",
    "Recipe": "transload.quantize.recipe",
    "import_recipe": "transload.quantize.imported",
    "quantize": "transload.quantize.run",
    "read_recipe": "transload.quantize.recipe",
    "shipped": "transload.quantize.recipe",
}

__all__ = ["QuantizeReport", "Recipe", "import_recipe", "quantize", "read_recipe", "shipped"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'transload.quantize' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


class _Quantizer(ModuleType):
    """This package as a function."""

    def __call__(
        self,
        model: str | Path,
        out: str | Path,
        recipe: str | Path | Recipe = "int4-g128",
        *,
        to: str = "compressed-tensors",
        calibration: str | Path | None = None,
        floats: str = "bf16",
        tokenizer: Any = None,
        overwrite: bool = False,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> QuantizeReport:
        """`transload.quantize.run.quantize`."""
        from transload.quantize.run import quantize

        return quantize(
            model,
            out,
            recipe,
            to=to,
            calibration=calibration,
            floats=floats,
            tokenizer=tokenizer,
            overwrite=overwrite,
            resume=resume,
            progress=progress,
        )


sys.modules[__name__].__class__ = _Quantizer
