"""The report's plots as SVG text, made by matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transload.errors import ConfigError
from transload.evaluation.result import Difference

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MODEL, _QUIET = "#0072B2", "#8a8a8a"


def plots(found: Difference) -> dict[str, str]:
    """Title -> SVG, the plots that there are data for. Raises ConfigError without matplotlib."""
    out = {
        "Output of every layer: signal to noise": _draw(lambda axis: _sqnr(axis, found)) if found.sqnr else "",
        "KL divergence by token": _draw(lambda axis: _histogram(axis, found)),
        "KL divergence along the text": _draw(lambda axis: _along(axis, found)),
    }
    return {title: svg for title, svg in out.items() if svg}


def _sqnr(axis: Axes, found: Difference) -> None:
    shown = {name: db for name, db in found.sqnr.items() if math.isfinite(db)}
    axis.bar(range(len(shown)), list(shown.values()), color=_MODEL)
    step = max(len(shown) // 8, 1)
    axis.set_xticks(range(0, len(shown), step), list(shown)[::step], rotation=30, ha="right")
    axis.set_ylabel("SQNR, dB (more is better)")


def _histogram(axis: Axes, found: Difference) -> None:
    count = len(found.kl_histogram)
    axis.bar(range(count), found.kl_histogram, width=0.9, color=_MODEL)
    names = ["< 1e-7", *(f"1e{power}" for power in range(-7, -8 + count))]
    axis.set_xticks(range(count), names)
    axis.set(xlabel="nats, from", ylabel="tokens")


def _along(axis: Axes, found: Difference) -> None:
    axis.plot(range(len(found.kl_by_window)), found.kl_by_window, marker=".", color=_MODEL)
    axis.axhline(found.kl, color=_QUIET, linewidth=0.8, linestyle="--")
    axis.set(xlabel="window", ylabel="nats per token")
    axis.set_ylim(bottom=0)


def _draw(draw: Callable[[Any], None]) -> str:
    try:
        import matplotlib
    except ImportError as e:
        raise ConfigError("the HTML report needs matplotlib: pip install 'transload[report]'") from e
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "transload", "font.size": 9}):
        figure = Figure(figsize=(7.2, 2.8), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
