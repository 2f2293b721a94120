"""The matmul benchmark on tiny cases: what is compared, how rows come out, peers of another environment."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from transload.bench import cases, ggml, matmul, peers, report
from transload.bench.cli import app
from transload.bench.remote import Environment
from transload.bench.timing import Local, interleaved, ratio
from transload.errors import ConfigError
from transload.hal import find_device

QUICK = matmul.Settings(threads=1, rounds=2, budget=0.001)


def rows_of(case: cases.MatmulCase, settings: matmul.Settings = QUICK) -> list[matmul.Row]:
    return list(matmul.run(*find_device("cpu"), [case], settings))


@pytest.mark.parametrize("scheme", cases.SCHEMES)
def test_a_row_has_a_time_and_an_error_for_everyone(scheme: str) -> None:
    (row,) = rows_of(cases.MatmulCase(64, 128, 3, 32, scheme))
    assert row.us > 0
    assert row.rel_err < 2e-2
    assert {"torch bf16", "torch fp32"} <= row.peers.keys()
    assert row.peers.keys() == row.faster.keys() == row.errors.keys() == row.schemes.keys()
    assert "vllm wna16" in row.absent or "vllm wna16" in row.peers
    assert json.loads(json.dumps(row.as_json()))["scheme"] == scheme


def test_experts_are_compared_with_loops_over_every_peer() -> None:
    """Also those of another environment; an expert without rows is left out."""
    settings = replace(QUICK, environments=(Path(sys.executable),))
    (row,) = rows_of(cases.MatmulCase(32, 64, 2, 32, "w4a8", experts=3), settings)
    assert row.experts == 3
    assert {"torch bf16", "torch fp32", "torch int4pack", "torch dyn_quant"} <= row.peers.keys()
    assert row.errors["torch bf16"] < 1e-2
    assert row.errors["torch fp32"] < 1e-6


def test_experts_without_rows_do_not_count_as_read() -> None:
    case = cases.MatmulCase(32, 64, 2, 32, "w4a8", experts=4)
    assert cases.operands(case, cases.weight_of(case)).used == 0.5


def test_peers_compute_the_same_product() -> None:
    """Whatever is installed: no peer is off by more than its scheme explains."""
    case = cases.MatmulCase(64, 256, 4, 128, "w4a16")
    data = cases.operands(case, cases.weight_of(case))
    given = peers.Data(data.weight.codes, data.weight.scales.float(), data.x.float(), 128, 1)
    truth = data.truth(case.m)
    for name, call in peers.prepared(given)[0].items():
        assert float((call().double() - truth).norm() / truth.norm()) < 3e-2, name


def test_peers_of_another_environment_join(tmp_path: Path) -> None:
    case = cases.MatmulCase(64, 128, 2, 64, "w4a16")
    data = cases.operands(case, cases.weight_of(case))
    given = peers.Data(data.weight.codes, data.weight.scales.float(), data.x.float(), 64, 1)
    with Environment(Path(sys.executable)) as environment:
        found, reasons = environment.load(given, tmp_path)
        remote = {peer.name: peer for peer in found}
        assert remote.keys() | reasons.keys() == {p.name for p in peers.PEERS}
        assert remote["torch fp32"].seconds(2) > 0
        assert torch.allclose(remote["torch fp32"].output().double(), data.truth(2), atol=1e-4)
        with pytest.raises(ConfigError, match="stopped"):
            environment.ask({"time": "nobody", "calls": 1})


def test_the_best_peer_is_of_the_same_scheme() -> None:
    row = matmul.Row(8, 8, 1, 8, "w4a8", 1, "ours", 10.0, 0.0, schemes={"a": "w4a8", "b": "w16a16"})
    row.faster.update(a=1.5, b=0.5)
    assert row.best_peer() == ("a", 1.5)
    assert "1.50 x the best peer" in report.summary([row])[0]


def test_fractions_of_the_limits_are_written(tmp_path: Path) -> None:
    row = matmul.Row(8, 8, 1, 8, "w4a8", 1, "ours", 10.0, 0.0, read=0.5, peak=0.25, peers={"a": 20.0})
    row = replace(row, faster={"a": 2.0}, errors={"a": 0.0}, schemes={"a": "w4a8"})
    report.write_csv([row], tmp_path / "t.csv")
    report.write_markdown([row], tmp_path / "t.md")
    with (tmp_path / "t.csv").open() as file:
        ours, peer = csv.DictReader(file)
    assert (ours["contender"], ours["of_read"], ours["of_peak"]) == ("ours", "0.5000", "0.2500")
    assert (peer["contender"], peer["faster"], peer["of_read"]) == ("a", "2.000", None)
    assert "| 50% | 25% | 2.00 |" in (tmp_path / "t.md").read_text()


def test_contenders_take_turns() -> None:
    order: list[str] = []
    pair = [Local(name, lambda name=name: order.append(name) or torch.zeros(1)) for name in "ab"]  # type: ignore[misc]
    times = interleaved(pair, 3, 0.0)
    assert [len(t) for t in times.values()] == [3, 3]
    assert "".join(order[4:]).replace("aa", "a").replace("bb", "b") in ("abbaab", "abab")
    assert ratio([2.0, 8.0, 6.0], [1.0, 2.0, 2.0]) == 3.0


@pytest.mark.parametrize("text", ["4096", "0x8", "axb", "1x2x3x4"])
def test_wrong_shapes_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match="NxK"):
        cases.parse_shape(text)


def test_an_unknown_scheme_is_an_error() -> None:
    with pytest.raises(ConfigError, match="w4a8, w4a16"):
        list(cases.cases([(8, 8)], [1], [8], ["w3a3"]))


def test_the_command_writes_table_csv_and_json(tmp_path: Path) -> None:
    arguments = ["matmul", "--shape", "64x128", "-m", "1", "-m", "2", "--group", "64", "--scheme", "w4a8"]
    files = [f"--{kind}={tmp_path}/t.{kind}" for kind in ("csv", "json", "markdown")]
    quick = ["--rounds", "1", "--seconds", "0.001", "--no-limits"]
    result = CliRunner().invoke(app, [*arguments, *files, *quick])
    assert result.exit_code == 0, result.output
    assert "best peer" in result.output
    lines = [json.loads(line) for line in (tmp_path / "t.json").read_text().splitlines()]
    assert [line["m"] for line in lines] == [1, 2]
    assert (tmp_path / "t.markdown").read_text().startswith("| N | K | group | scheme |")
    with (tmp_path / "t.csv").open() as file:
        assert {"onnx", "torch bf16"} <= {line["contender"] for line in csv.DictReader(file)}


def test_a_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report.plot(rows_of(cases.MatmulCase(64, 128, 1, 64, "w4a8")), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_symmetric_weight_is_a_q4_0_tensor_exactly() -> None:
    """gguf's own reader gives back the numbers that were packed."""
    gguf = pytest.importorskip("gguf")
    case = cases.MatmulCase(4, 256, 1, 128, "w4a8")
    weight = cases.weight_of(case)
    blocks = ggml.q4_0(weight.codes.numpy(), weight.scales.float().numpy(), 128)
    found = gguf.dequantize(blocks.reshape(4, -1), gguf.GGMLQuantizationType.Q4_0)
    assert torch.equal(torch.from_numpy(found), weight.dequantize())
