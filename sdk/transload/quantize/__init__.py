"""Quantizing: recipes, methods as pure maths, calibration layer by layer, and the same targets as a port.

    import transload
    report = transload.quantize("Qwen3-8B", "Qwen3-8B-int4", "int4-g128", to="vllm")

The package itself can be called, so that `transload.quantize(...)` works whether or not its modules are imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transload.package import lazy, make_callable

if TYPE_CHECKING:
    from transload.quantize.imported import import_recipe as import_recipe
    from transload.quantize.recipe import Recipe as Recipe
    from transload.quantize.recipe import read_recipe as read_recipe
    from transload.quantize.recipe import shipped as shipped
    from transload.quantize.report import QuantizeReport as QuantizeReport
    from transload.quantize.run import quantize as quantize

_HOMES = {
    "QuantizeReport": "transload.quantize.report",
    "Recipe": "transload.quantize.recipe",
    "import_recipe": "transload.quantize.imported",
    "quantize": "transload.quantize.run",
    "read_recipe": "transload.quantize.recipe",
    "shipped": "transload.quantize.recipe",
}

__all__ = sorted(_HOMES)
__getattr__ = lazy(__name__, _HOMES)
make_callable(__name__)
