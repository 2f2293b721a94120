"""`transload bench matmul --device cuda`: the same command, measured as a GPU is measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from transload.bench import gpu, gpu_report, gpu_shapes
from transload.bench.gpu_clock import Machine
from transload.bench.gpu_report import Run
from transload.errors import ConfigError

DEFAULT_GROUP = 128


@dataclass(frozen=True, slots=True)
class Files:
    """Where results go; None: not written."""

    csv: Path | None = None
    json: Path | None = None
    markdown: Path | None = None
    plot: Path | None = None


def plan(
    shapes: Sequence[str] | None,
    rows: Sequence[int] | None,
    groups: Sequence[int] | None,
    asked: Sequence[str] | None,
    with_peers: bool,
    minutes: float | None,
) -> gpu.Plan:
    """What a command line asks for; by default every layer of the models in `gpu_shapes` in groups of 128.

    rows are tokens where there are experts. Raises ConfigError.
    """
    found = gpu_shapes.shapes(shapes, groups or (DEFAULT_GROUP,)) if shapes else ()
    if not found:
        found = tuple(replace(s, group=g) for s in gpu_shapes.SHAPES for g in groups or (DEFAULT_GROUP,))
    for s in found:
        if s.k % s.group:
            raise ConfigError(f"shape '{s.name}': K={s.k} is not a multiple of the group of {s.group}")
    tokens = rows or gpu_shapes.TOKENS
    return gpu.Plan(found, rows or gpu_shapes.ROWS, tokens, schemes(asked), with_peers, minutes)


def schemes(asked: Sequence[str] | None) -> tuple[str, ...]:
    """W4A16 and W4A8, or what was asked for. Raises ConfigError for another scheme."""
    known = ("W4A16", "W4A8")
    found = tuple(s.upper() for s in asked or known)
    if unknown := [s for s in found if s not in known]:
        raise ConfigError(f"scheme '{unknown[0].lower()}': give w4a16 or w4a8")
    return found


def measure(plan: gpu.Plan, on: Machine, files: Files, say: Callable[[str], None]) -> Run:
    """Runs the plan, says every result as it comes, and writes the files.

    The JSON file is written after every result, so that a run that is cut short keeps what it has.
    """
    copy_gb_s, bf16_tflop_s = on.rates()
    done = Run((), on.device.model, torch.__version__, copy_gb_s, bf16_tflop_s, on.dry_run)
    say(done.head)
    say(gpu_report.table(done)[0])
    for row in gpu.run(plan, on):
        done = Run((*done.rows, row), done.device, done.torch, copy_gb_s, bf16_tflop_s, on.dry_run)
        say(gpu_report.table(Run((row,), done.device, done.torch, copy_gb_s, bf16_tflop_s))[1])
        if files.json:
            gpu_report.write_json(done, files.json)
    for line in ("", *gpu_report.targets(done), *gpu_report.choices(done)):
        say(line)
    for what in plan.left_out:
        say(f"left out, no time: {what}")
    for write, path in (
        (gpu_report.write_csv, files.csv),
        (gpu_report.write_markdown, files.markdown),
        (gpu_report.plot, files.plot),
    ):
        if path:
            write(done, path)
    return done
