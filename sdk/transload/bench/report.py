"""The benchmark's results as a table, as CSV, as JSON rows and as a plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import TYPE_CHECKING

from transload.bench.matmul import Row
from transload.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


def table(rows: Sequence[Row]) -> Table:
    """One line a case: time, error, limits reached, and the best peer of the same scheme."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("N", "K", "M", "group", "scheme", "threads", "kernel"):
        out.add_column(name, justify="left" if name in ("scheme", "kernel") else "right")
    for name in ("us", "error", "of read", "of peak", "best peer", "faster"):
        out.add_column(name, justify="left" if name == "best peer" else "right")
    for r in rows:
        best = r.best_peer()
        shape = f"{r.experts}x{r.n}" if r.experts else str(r.n)
        out.add_row(
            *(shape, str(r.k), str(r.m), str(r.group), r.scheme, str(r.threads), r.kernel),
            *(f"{r.us:.0f}", f"{r.rel_err:.1e}", _percent(r.read), _percent(r.peak)),
            *((best[0], _times(best[1])) if best else ("", "")),
        )
    return out


def summary(rows: Sequence[Row]) -> list[str]:
    """For every scheme: how often and by how much the chosen kernel beats the best peer of the same scheme."""
    lines = []
    for scheme in dict.fromkeys(r.scheme for r in rows):
        found = [best[1] for r in rows if r.scheme == scheme and (best := r.best_peer())]
        if found:
            lines.append(
                f"{scheme}: {geometric_mean(found):.2f} x the best peer of each case (geometric mean of {len(found)}),"
                f" from {min(found):.2f} to {max(found):.2f}, {sum(f < 0.95 for f in found)} cases below 0.95"
            )
    return lines


def write_json(rows: Sequence[Row], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(r.as_json()) + "\n" for r in rows), encoding="utf-8")


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """A line a case and a column a contender: microseconds of the chosen kernel, then how many times faster it is."""
    names = list(dict.fromkeys(name for r in rows for name in r.faster))
    head = ["N", "K", "group", "scheme", "M", "threads", "kernel", "us", "error", "of read", "of peak", *names]
    lines = [head, ["---"] * len(head)]
    for r in rows:
        case = (f"{r.experts}x{r.n}" if r.experts else r.n, r.k, r.group, r.scheme, r.m, r.threads, r.kernel)
        times = [f"{r.faster[name]:.2f}" if name in r.faster else "" for name in names]
        lines.append([*map(str, case), f"{r.us:.0f}", f"{r.rel_err:.1e}", _percent(r.read), _percent(r.peak), *times])
    path.write_text("".join("| " + " | ".join(line) + " |\n" for line in lines), encoding="utf-8")


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """One line for every contender of every case; fractions of the measured limits for the chosen kernel."""
    names = ("n", "k", "m", "group", "experts", "scheme", "threads", "contender", "computes", "us", "rel_err", "faster")
    limits = ("of_read", "of_peak")
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow((*names, *limits))
        for r in rows:
            case = (r.n, r.k, r.m, r.group, r.experts or "", r.scheme, r.threads)
            reached = ("" if part is None else f"{part:.4f}" for part in (r.read, r.peak))
            out.writerow((*case, r.kernel, r.scheme, f"{r.us:.2f}", f"{r.rel_err:.3e}", "1", *reached))
            for name, us in r.peers.items():
                line = (name, r.schemes[name], f"{us:.2f}", f"{r.errors[name]:.3e}", f"{r.faster[name]:.3f}")
                out.writerow((*case, *line))


def plot(rows: Sequence[Row], path: Path) -> None:
    """Time over M for every contender, one panel a shape, group and scheme. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise ConfigError("a plot needs matplotlib: pip install 'transload[report]'") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((r.experts or 1, r.n, r.k, r.group, r.scheme, r.threads) for r in rows))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(5 * columns, 3.6 * lines), squeeze=False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        chosen = [r for r in rows if (r.experts or 1, r.n, r.k, r.group, r.scheme, r.threads) == panel]
        for name in dict.fromkeys(name for r in chosen for name in r.peers):
            points = [(r.m, r.peers[name]) for r in chosen if name in r.peers]
            axis.plot(*zip(*points, strict=True), marker=".", linewidth=0.8, label=name)
        axis.plot([r.m for r in chosen], [r.us for r in chosen], "k-o", linewidth=2, label=chosen[0].kernel)
        axis.set(xscale="log", yscale="log", xlabel="M", ylabel="us")
        axis.set_title("{}x N={} K={} g{} {} {} threads".format(*panel), fontsize=9)
        axis.legend(fontsize=6)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _times(value: float) -> str:
    color = "green" if value >= 1.05 else "red" if value < 0.95 else "yellow"
    return f"[{color}]{value:.2f} x[/]"
