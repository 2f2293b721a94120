"""The model benchmark's results as a table, as sentences, as CSV, Markdown, JSON rows and as a plot."""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from transload.bench.model import REFERENCE, ModelRow, Result, busy
from transload.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

_SHORT = {"transload w4a16": "W4A16", "transload w4a8": "W4A8"}


def table(result: Result) -> Table:
    """One line an engine; the columns on the right say how many times faster ours is, prompt and decoding."""
    from rich.table import Table

    out = Table(box=None, pad_edge=False, header_style="bold")
    out.add_column("engine", no_wrap=True)
    first = result.rows[0]
    heads = [f"prompt {first.prompt_tokens}\ntokens/s", f"decode {first.decode_tokens}\ntokens/s", "of read\nbandwidth"]
    heads += ["first token s\nwarm   cold", "load s", "peak MB", "same\ntokens"]
    ours = _ours(result.rows)
    heads += [f"{_SHORT[name]} faster\nprompt  decode" for name in ours]
    for head in heads:
        out.add_column(head, justify="right")
    for r in result.rows:
        cells = _cells(r)
        cells[4:6] = [f"{cells[4]}  {cells[5]:>5}"]
        ratios = (f"{_times(r.faster[n][0])}  {_times(r.faster[n][1])}" if n in r.faster else "" for n in ours)
        out.add_row(*cells, *ratios)
    return out


def notes(result: Result) -> list[str]:
    """What the numbers need beside them, in sentences."""
    rows = result.rows
    lines = [f"{r.name}: {r.detail}; " + ", ".join(f"{n} {v}" for n, v in r.versions.items()) for r in rows]
    if result.read_bytes_per_second:
        lines.append(f"read bandwidth {result.read_bytes_per_second / 1e9:.1f} GB/s, the best of sums over 512 MB")
    if any(r.same_tokens is not None for r in rows):
        lines.append(f"same tokens: of {len(rows[0].tokens)}, how many at the beginning are those of {REFERENCE}")
    if all(r.clock == "cpu" for r in rows):
        lines.append("all times are processor time, in which waiting for others does not count")
    return lines


def warnings(result: Result) -> list[str]:
    """What speaks against the numbers, in sentences."""
    lines = [f"{r.name}: the answer {r.degenerate}: it is no text" for r in result.rows if r.degenerate]
    lines += [f"{r.name} used {r.idle:.0%} of a core while others were measured" for r in busy(result.rows)]
    has_avx512 = _processor_has("avx512f")
    for r in result.rows:
        if r.name.startswith("llama") and has_avx512 and "AVX512" not in r.detail:
            lines.append(f"{r.name} is a build without AVX512, which this processor has: build it here for its best")
    return lines


def write_json(result: Result, path: Path) -> None:
    """One JSON object a line: an engine with every round, and when and where it was measured."""
    about = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": platform.platform(),
        "read_bytes_per_second": result.read_bytes_per_second,
    }
    path.write_text("".join(json.dumps({**r.as_json(), **about}) + "\n" for r in result.rows), encoding="utf-8")


def write_csv(result: Result, path: Path) -> None:
    """One line an engine, in plain numbers."""
    ours = _ours(result.rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow([*_FIELDS, *(f"{_SHORT[n].lower()}_faster_{what}" for n in ours for what in ("prompt", "decode"))])
        for r in result.rows:
            ratios = [f"{x:.3f}" for n in ours for x in r.faster.get(n, (1.0, 1.0))]
            values = (getattr(r, name) for name in _FIELDS)
            out.writerow([*("" if v is None else f"{v:.4f}" if isinstance(v, float) else v for v in values), *ratios])


_FIELDS = (
    "name", "threads", "clock", "prompt_tokens", "decode_tokens", "prompt_tokens_per_second",
    "tokens_per_second", "read", "first_token_seconds", "cold_first_token_seconds", "load_seconds", "peak_bytes",
    "weight_bytes", "same_tokens", "degenerate", "idle", "detail",
)  # fmt: skip


def write_markdown(result: Result, path: Path) -> None:
    """The table for a document."""
    ours = _ours(result.rows)
    head = [
        "engine",
        "prompt tokens/s",
        "decode tokens/s",
        "of read bandwidth",
        "first token s",
        "after load s",
        "load s",
    ]
    head += ["peak MB", "same tokens", *(f"{_SHORT[n]} faster, {what}" for n in ours for what in ("prompt", "decode"))]
    lines = [head, ["---"] * len(head)]
    for r in result.rows:
        lines.append(
            [*_cells(r), *(f"{x:.2f}" if n in r.faster else "" for n in ours for x in r.faster.get(n, (1, 1)))]
        )
    path.write_text("".join("| " + " | ".join(line) + " |\n" for line in lines), encoding="utf-8")


def plot(result: Result, path: Path) -> None:
    """Bars of both speeds, every round as a dot. Raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as e:
        raise ConfigError("a plot needs matplotlib: pip install 'transload[report]'") from e
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result.rows
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.2 + 0.45 * len(rows)), sharey=True)
    parts = (
        (axes[0], f"prompt of {rows[0].prompt_tokens} tokens", [(r.prompt_tokens, r.prompt_seconds) for r in rows]),
        (axes[1], f"decoding {rows[0].decode_tokens} tokens", [(r.decode_tokens, r.decode_seconds) for r in rows]),
    )
    for axis, title, measured in parts:
        for place, (tokens, seconds) in enumerate(measured):
            speeds = sorted(tokens / s for s in seconds)
            axis.barh(place, speeds[len(speeds) // 2], color="tab:blue" if rows[place].name in _SHORT else "silver")
            axis.plot(speeds, [place] * len(speeds), "k.", markersize=4)
        axis.set(title=title, xlabel="tokens/s", yticks=range(len(rows)), yticklabels=[r.name for r in rows])
    axes[0].invert_yaxis()
    figure.suptitle(f"{rows[0].threads} threads, {rows[0].clock} clock", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _cells(r: ModelRow) -> list[str]:
    return [
        *(r.name, f"{r.prompt_tokens_per_second:.0f}", f"{r.tokens_per_second:.1f}"),
        "" if r.read is None else f"{r.read:.0%}",
        *(f"{r.first_token_seconds:.2f}", f"{r.cold_first_token_seconds:.2f}", f"{r.load_seconds:.1f}"),
        f"{r.peak_bytes / 1e6:.0f}",
        "" if r.same_tokens is None else str(r.same_tokens),
    ]


def _ours(rows: Sequence[ModelRow]) -> list[str]:
    return [r.name for r in rows if r.name in _SHORT]


def _times(value: float) -> str:
    color = "green" if value >= 1.05 else "red" if value < 0.95 else "yellow"
    return f"[{color}]{value:5.2f}[/]"


def _processor_has(flag: str) -> bool:
    try:
        return flag in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
