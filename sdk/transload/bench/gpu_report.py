"""What the GPU benchmark found: a table, the targets, CSV, JSON lines, a table for a document and a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import geometric_mean

from transload.bench.gpu import LOOP, GpuRow
from transload.bench.gpu_peers import CUBLAS, INT4PACK
from transload.errors import ConfigError

BIG_BYTES = 64 << 20  # weights that no cache holds


@dataclass(frozen=True, slots=True)
class Run:
    """Every row, and the machine: device, torch version, copy bandwidth in GB/s and bfloat16 rate in TFLOP/s."""

    rows: Sequence[GpuRow]
    device: str
    torch: str
    copy_gb_s: float
    bf16_tflop_s: float
    dry_run: bool = False

    @property
    def head(self) -> str:
        """The machine in a line."""
        rates = f"copy {self.copy_gb_s:.0f} GB/s, bf16 matmul {self.bf16_tflop_s:.1f} TFLOP/s"
        return f"{self.device}, torch {self.torch}: {rates}"


HEAD = ("shape", "M", "kernel", "scheme", "us", "GB/s", "of copy", "TFLOP/s", "of bf16", "error")


def table(run: Run) -> list[str]:
    """One line a measurement; * marks what `hal.choose` takes."""
    lines = [f"{'shape':30} {'M':>5} {'kernel':30} {'scheme':7}" + "".join(f" {name:>9}" for name in HEAD[4:])]
    for r in run.rows:
        start = f"{r.shape:30} {r.m or '':>5} {r.peer + ('*' if r.chosen else ''):30} {r.scheme:7}"
        lines.append(f"{start} - {r.note}" if r.us is None else start + "".join(f" {c:>9}" for c in _cells(r, run)))
    return lines


def _cells(r: GpuRow, run: Run) -> tuple[str, ...]:
    assert r.us is not None
    gb_s, tflop_s = r.gb_s or 0.0, r.tflop_s or 0.0
    error = "" if r.error is None else f"{r.error:.1e}"
    shares = f"{gb_s / run.copy_gb_s:.2f}", f"{tflop_s / run.bf16_tflop_s:.2f}"
    return f"{r.us:.1f}", f"{gb_s:.0f}", shares[0], f"{tflop_s:.1f}", shares[1], error


def targets(run: Run) -> list[str]:
    """Every target with what was reached."""
    if run.dry_run:
        return ["not measured: the times of a dry run say nothing"]
    dense = [r for r in run.rows if not r.experts and r.us]
    few, many = [r for r in dense if r.m <= 16], [r for r in dense if r.m >= 512]
    big = [r for r in _best(_ours(few, "W4A16")) if r.n * r.k / 2 > BIG_BYTES]
    experts = [r for r in run.rows if r.experts and r.us]
    shares = [(r.gb_s or 0.0) / run.copy_gb_s for r in big]
    rivals = [r for r in few if not r.ours and r.scheme == "W4A16"]
    return [
        _line("W4A16, M <= 16, weights above 64 MB: least share of copy bandwidth", shares, 0.85),
        _line("W4A16, M <= 16: least speed against the fastest other", _against(_ours(few, "W4A16"), rivals), 0.95),
        _line("W4A16, M <= 16: geometric mean against torch's int4", _mean(_named(few, "W4A16", INT4PACK)), 1.1),
        _line("W4A8, M >= 512: least speed against torch bf16", _named(many, "W4A8", CUBLAS), 1.3),
        _line("W4A16, M >= 512: least speed against torch bf16", _named(many, "W4A16", CUBLAS), 0.95),
        _line(
            "experts: least speed against a loop in bf16",
            _against(_ours(experts, "W4A16") + _ours(experts, "W4A8"), _loops(experts)),
            3,
        ),
    ]


def choices(run: Run) -> list[str]:
    """Where one of our kernels was more than 5 % faster than the one of the same activations that is chosen."""
    lines = []
    for r in _best([r for r in run.rows if r.ours and r.us and not run.dry_run]):
        same = [c for c in run.rows if c.chosen and c.us and _key(c) == _key(r) and c.scheme == r.scheme]
        slower = [c.us / r.us for c in same if c.us and r.us]
        if slower and min(slower) > 1.05:
            lines.append(f"{r.shape} M={r.m} {r.scheme}: {r.peer} is {min(slower):.2f} x as fast as what is chosen")
    return lines


def _key(r: GpuRow) -> tuple[str, int, int]:
    return r.shape, r.group, r.m


# Kernels of ours that call somebody else's product: no target is reached by them.
BORROWED = ("transload torch-int4pack", "transload dequantize", "transload humming")


def _ours(rows: Iterable[GpuRow], scheme: str) -> list[GpuRow]:
    return [r for r in rows if r.ours and r.scheme == scheme and r.peer not in BORROWED]


def _loops(rows: Iterable[GpuRow]) -> list[GpuRow]:
    return [r for r in rows if r.peer == LOOP]


def _named(rows: Sequence[GpuRow], scheme: str, peer: str) -> list[float]:
    return _against(_ours(rows, scheme), [r for r in rows if r.peer == peer])


def _best(rows: Iterable[GpuRow]) -> list[GpuRow]:
    """The fastest row of every shape and M."""
    fastest: dict[tuple[str, int, int], GpuRow] = {}
    for r in rows:
        if r.us is not None and (_key(r) not in fastest or r.us < (fastest[_key(r)].us or 0)):
            fastest[_key(r)] = r
    return list(fastest.values())


def _against(own: Iterable[GpuRow], rivals: Iterable[GpuRow]) -> list[float]:
    """The fastest rival's time over our fastest, where both were measured."""
    theirs = {_key(r): r.us for r in _best(rivals)}
    return [us / r.us for r in _best(own) if r.us and (us := theirs.get(_key(r)))]


def _mean(ratios: Sequence[float]) -> list[float]:
    return [geometric_mean(ratios)] if ratios else []


def _line(what: str, found: Sequence[float], wanted: float) -> str:
    if not found:
        return f"not measured  {what} (wanted {wanted:.2f})"
    return f"{'reached' if min(found) >= wanted else 'MISSED':12}  {what}: {min(found):.2f} (wanted {wanted:.2f})"


def write_csv(run: Run, path: Path) -> None:
    """One line a measurement."""
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, [f.name for f in fields(GpuRow)])
        out.writeheader()
        out.writerows(asdict(r) for r in run.rows)


def write_json(run: Run, path: Path) -> None:
    """One JSON object a line, each with the machine in it."""
    machine = {f.name: getattr(run, f.name) for f in fields(Run) if f.name != "rows"}
    path.write_text("".join(json.dumps({**asdict(r), **machine}) + "\n" for r in run.rows), encoding="utf-8")


def write_markdown(run: Run, path: Path) -> None:
    """The machine, the targets and a table for docs/benchmarks.md: microseconds of everyone by shape and M."""
    measured = [r for r in run.rows if r.us is not None]
    peers = list(dict.fromkeys((r.peer, r.scheme) for r in measured))
    head = ["shape", "M", *(f"{peer} ({scheme})" for peer, scheme in peers)]
    lines = [head, ["---"] * len(head)]
    times = {(_key(r), (r.peer, r.scheme)): _time(r, run) for r in measured}
    for key in dict.fromkeys(map(_key, measured)):
        lines.append([key[0], str(key[2]), *(times.get((key, peer), "") for peer in peers)])
    text = [run.head, "", *(f"- {line}" for line in targets(run)), "", *("| " + " | ".join(x) + " |" for x in lines)]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def _time(r: GpuRow, run: Run) -> str:
    share = f" ({(r.gb_s or 0) / run.copy_gb_s:.0%} of copy)" if r.m <= 16 else f" ({r.tflop_s:.0f} TFLOP/s)"
    return f"{r.us:.1f}{share}"


def plot(run: Run, path: Path) -> None:
    """Time over M for everyone, one panel a shape. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise ConfigError("a plot needs matplotlib: pip install 'transload[report]'") from e
    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [r for r in run.rows if r.us is not None]
    panels = list(dict.fromkeys((r.shape, r.group) for r in measured))
    columns = min(4, len(panels))
    size = (5 * columns, 3.6 * -(-len(panels) // columns))
    figure, axes = pyplot.subplots(-(-len(panels) // columns), columns, squeeze=False, figsize=size)
    for axis, (shape, group) in zip(axes.flat, panels, strict=False):
        rows = [r for r in measured if (r.shape, r.group) == (shape, group)]
        for peer in dict.fromkeys(r.peer for r in rows):
            points = [(r.m, r.us) for r in rows if r.peer == peer]
            line = "o-" if peer.startswith("transload") else ".--"
            axis.loglog(*zip(*points, strict=True), line, linewidth=1, label=peer)
        axis.set(title=f"{shape} g{group}", xlabel="M", ylabel="us")
        axis.legend(fontsize=6)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    figure.suptitle(run.head)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
