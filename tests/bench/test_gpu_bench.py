"""The GPU benchmark without a GPU: every step of it in a dry run, and what the report makes of given numbers."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from transload import hal
from transload.bench import gpu, gpu_cli, gpu_report, gpu_shapes
from transload.bench.cli import app
from transload.bench.gpu import GpuRow, Plan
from transload.bench.gpu_clock import Machine
from transload.bench.gpu_report import Run
from transload.errors import ConfigError, NoBackend
from transload.hal import Device, find_device

DEVICE = Device("cuda", 0, "Some GPU", "sm_90", 1 << 30, 1 << 30)
TINY = Plan(gpu_shapes.TINY, gpu_shapes.TINY_ROWS, (2,))


def machine() -> Machine:
    """Host tensors and the processor's kernels in the place of a GPU's."""
    return Machine(DEVICE, torch.device("cpu"), tuple(find_device("cpu")[0].kernels), dry_run=True)


def test_a_dry_run_walks_through_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "STRANGERS", [p for p in gpu.STRANGERS if p.name in ("humming", "gemlite")])
    files = gpu_cli.Files(*(tmp_path / f"bench.{end}" for end in ("csv", "json", "md", "png")))
    if not _has_matplotlib():
        files = replace(files, plot=None)
    said: list[str] = []
    done = gpu_cli.measure(replace(TINY), machine(), files, said.append)
    ours = {(r.scheme, r.experts > 0) for r in done.rows if r.ours and r.us}
    assert ours == {(scheme, experts) for scheme in ("W4A16", "W4A8") for experts in (False, True)}
    assert all(r.error is not None and r.error < 3e-2 for r in done.rows if r.us and (r.ours or r.peer == "torch bf16"))
    assert {"torch bf16", "humming", "gemlite", gpu.LOOP} <= {r.peer for r in done.rows}
    assert all(r.us or r.note for r in done.rows)
    assert "not measured: the times of a dry run say nothing" in said
    with files.csv.open() as file:  # type: ignore[union-attr]
        assert len(list(csv.DictReader(file))) == len(done.rows)
    lines = [json.loads(line) for line in files.json.read_text().splitlines()]  # type: ignore[union-attr]
    assert len(lines) == len(done.rows)
    assert lines[0]["device"] == "Some GPU"
    assert "| tiny | 17 |" in files.markdown.read_text()  # type: ignore[union-attr]
    assert files.plot is None or files.plot.stat().st_size > 1000


def _has_matplotlib() -> bool:
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def test_what_there_is_no_time_for_is_named() -> None:
    plan = replace(TINY, minutes=0.0, left_out=[])
    assert list(gpu.run(plan, machine())) == []
    assert plan.left_out == ["tiny: everything", "tiny experts: everything", "tiny: other libraries"]


PLAIN = GpuRow("big", 16384, 16384, 128, 0, 1, "", "W4A16")


def measured(peer: str, us: float, m: int = 1, scheme: str = "W4A16", **change: object) -> GpuRow:
    own = peer.startswith("transload")
    return replace(PLAIN, peer=peer, m=m, scheme=scheme, ours=own, **change).measured(us, 1e-3)  # type: ignore[arg-type]


def run_of(*rows: GpuRow) -> Run:
    return Run(rows, "Some GPU", "2", 4000.0, 800.0)


def test_bytes_and_operations_become_rates() -> None:
    row = measured("transload a", 100.0)
    assert row.gb_s == pytest.approx(16384**2 * (0.5 + 2 / 128) / 100e-6 / 1e9)
    assert row.tflop_s == pytest.approx(2 * 16384**2 / 100e-6 / 1e12)
    experts = replace(PLAIN, experts=128, m=8, scheme="W16A16").measured(100.0, None)
    assert experts.gb_s == pytest.approx(8 * 2 * 16384**2 / 100e-6 / 1e9)


def test_targets_are_reached_or_missed_by_the_fastest_of_ours() -> None:
    few = [measured("transload a", 40.0), measured("transload b", 30.0), measured("torch int4pack", 36.0)]
    many = [
        measured("transload c", 50.0, 512, "W4A8"), measured("torch bf16", 60.0, 512, "W16A16"),
        measured("transload a", 62.0, 512),
    ]  # fmt: skip
    experts = [
        measured(gpu.LOOP, 400.0, 8, "W16A16", experts=4), measured("transload a", 100.0, 8, experts=4),
    ]  # fmt: skip
    found = gpu_report.targets(run_of(*few, *many, *experts))
    assert [line.split()[0] for line in found] == ["reached", "reached", "reached", "MISSED", "reached", "reached"]
    assert ": 1.15 (wanted 0.85)" in found[0]
    assert ": 1.20 (wanted 1.10)" in found[2]
    assert gpu_report.targets(run_of())[0].startswith("not measured")
    borrowed = gpu_report.targets(run_of(measured("transload torch-int4pack", 1.0), measured("torch int4pack", 36.0)))
    assert borrowed[2].startswith("not measured")


def test_a_kernel_that_should_be_chosen_is_named() -> None:
    rows = [replace(measured("transload a", 40.0), chosen=True), measured("transload b", 30.0)]
    assert gpu_report.choices(run_of(*rows)) == [
        "big M=1 W4A16: transload b is 1.33 x as fast as what is chosen"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scheme", "w8a8"], "scheme 'w8a8': give w4a16 or w4a8"),
        (["--shape", "64x200"], "K=200 is not a multiple of the group of 128"),
        (["--threads", "2"], "a GPU is timed by its own clock"),
    ],
)
def test_options_that_a_gpu_cannot_take_are_refused(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Cuda:
        kernels = ()

        def torch_device(self, device: Device) -> torch.device:
            return torch.device("cuda")

    monkeypatch.setattr(hal, "find_device", lambda name: (Cuda(), DEVICE))
    result = CliRunner().invoke(app, ["matmul", "--device", "cuda", *arguments])
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_one_sentence_says_so() -> None:
    result = CliRunner().invoke(app, ["matmul", "--device", "cuda"])
    assert isinstance(result.exception, NoBackend)
    assert str(result.exception).startswith("device 'cuda' cannot be used: cuda: ")
