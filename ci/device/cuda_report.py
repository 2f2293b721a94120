"""Tables, targets, CSV and a plot of what cuda_bench.py measured."""

from __future__ import annotations

import csv
from math import exp, log
from pathlib import Path
from typing import Any

OURS = "transload "
BIG_BYTES = 64 << 20  # weights that no cache holds


def report(document: dict[str, Any], out: Path) -> str:
    """The whole report as text; writes bench.txt, bench.csv and, where matplotlib is, bench.png beside it."""
    machine, rows = document["machine"], document["rows"]
    head = (
        f"{machine['device']}, torch {machine['torch']}: copy {machine['copy_gb_s']:.0f} GB/s, "
        f"bf16 matmul {machine['bf16_tflop_s']:.1f} TFLOP/s"
    )
    text = "\n".join((head, *table(rows, machine), "", "Targets", *targets(rows, machine), ""))
    (out / "bench.txt").write_text(text)
    with (out / "bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _plot(rows, out / "bench.png")
    return text


def weight_bytes(row: dict[str, Any]) -> float:
    """Bytes that a product must read: 4-bit codes and 16-bit scales, or 16-bit weights; of visited experts only."""
    visited = min(row["experts"], row["m"]) or 1
    per_weight = 2 if row["scheme"] == "W16A16" else 0.5 + 2 / 128
    return float(row["n"] * row["k"] * visited * per_weight)


def table(rows: list[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    """One line a measurement: time, share of copy bandwidth, TFLOP/s, error."""
    lines = [
        f"{'shape':32} {'M':>5} {'kernel':28} {'scheme':9} {'us':>10} {'GB/s':>7} {'of copy':>8} {'TFLOP/s':>8} error"
    ]
    for row in rows:
        start = f"{row['shape']:32} {row['m'] or '':>5} {row['peer']:28} {row['scheme']:9}"
        if row["us"] is None:
            lines.append(f"{start} - {row['note']}")
            continue
        rate = weight_bytes(row) / row["us"] / 1e3
        flops = 2 * row["m"] * row["n"] * row["k"] / row["us"] / 1e6
        error = "own weights" if row["error"] is None else f"{row['error']:.2e}"
        share = rate / machine["copy_gb_s"]
        lines.append(f"{start} {row['us']:10.1f} {rate:7.0f} {share:8.2f} {flops:8.2f} {error}")
    return lines


def targets(rows: list[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    """Every target with what was reached."""
    dense = [r for r in rows if not r["experts"] and r["us"]]
    few, many = [r for r in dense if r["m"] <= 16], [r for r in dense if r["m"] >= 512]
    big = [r for r in few if r["n"] * r["k"] / 2 > BIG_BYTES and _ours(r, "W4A16")]
    shares = [weight_bytes(r) / r["us"] / 1e3 / machine["copy_gb_s"] for r in _best(big)]
    if machine["dry_run"]:
        return ["  not measured: times of a dry run say nothing"]
    alone, int4, cublas = None, "transload torch-int4pack", "cuBLAS bf16"
    return [
        _line("W4A16, M <= 16, above 64 MB: least share of copy bandwidth", _least(shares), 0.85),
        _line("W4A16, M <= 16: least speed against the best peer", _least(_against(few, "W4A16", alone)), 0.95),
        _line("W4A16, M <= 16: geometric mean against torch's int4", _mean(_against(few, "W4A16", int4)), 1.1),
        _line("W4A8, M >= 512: least speed against cuBLAS bf16", _least(_against(many, "W4A8", cublas)), 1.3),
        _line("W4A16, M >= 512: least speed against cuBLAS bf16", _least(_against(many, "W4A16", cublas)), 0.95),
        _line("experts: least speed against a loop in bf16", _least(_experts(rows)), 3.0),
    ]


def _least(ratios: list[float]) -> float | None:
    return min(ratios, default=None)


def _ours(row: dict[str, Any], scheme: str) -> bool:
    strangers = ("transload torch-int4pack", "transload dequantize")
    return row["peer"].startswith(OURS) and row["peer"] not in strangers and row["scheme"] == scheme


def _best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest row of every shape and M."""
    fastest: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["shape"], row["m"])
        if key not in fastest or row["us"] < fastest[key]["us"]:
            fastest[key] = row
    return list(fastest.values())


def _against(rows: list[dict[str, Any]], scheme: str, peer: str | None) -> list[float]:
    """Their time over ours, by shape and M; peer None is the fastest stranger of the same scheme."""
    ratios = []
    for own in _best([r for r in rows if _ours(r, scheme)]):
        theirs = [
            r["us"] for r in rows
            if (r["shape"], r["m"]) == (own["shape"], own["m"])
            and (r["peer"] == peer if peer else not _ours(r, scheme) and r["scheme"] == scheme)
        ]  # fmt: skip
        ratios += [min(theirs) / own["us"]] if theirs else []
    return ratios


def _experts(rows: list[dict[str, Any]]) -> list[float]:
    grouped = [r for r in rows if r["experts"] and r["us"]]
    loops = {(r["shape"], r["m"]): r["us"] for r in grouped if r["peer"].startswith("loop")}
    ours = _best([r for r in grouped if r["peer"].startswith(OURS)])
    return [loops[r["shape"], r["m"]] / r["us"] for r in ours if (r["shape"], r["m"]) in loops]


def _mean(ratios: list[float]) -> float | None:
    return exp(sum(map(log, ratios)) / len(ratios)) if ratios else None


def _line(what: str, found: float | None, wanted: float) -> str:
    if found is None:
        return f"  not measured  {what} (wanted {wanted})"
    return f"  {'reached' if found >= wanted else 'MISSED':12}  {what}: {found:.2f} (wanted {wanted})"


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return
    shapes = list(dict.fromkeys(r["shape"] for r in rows if r["us"]))
    figure, axes = pyplot.subplots(-(-len(shapes) // 4), min(4, len(shapes)), squeeze=False, figsize=(18, 10))
    for axis, shape in zip(axes.flat, shapes, strict=False):
        for peer in dict.fromkeys(r["peer"] for r in rows if r["shape"] == shape and r["us"]):
            points = [(r["m"], r["us"]) for r in rows if r["shape"] == shape and r["peer"] == peer and r["us"]]
            axis.loglog(*zip(*points, strict=True), marker="o", label=peer)
        axis.set(title=shape, xlabel="M", ylabel="us")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
