"""preflight.sh on machines that are right and machines that are not: the vendors' tools are replaced by small ones."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.plans import CASES, Case
from transload.errors import ConfigError
from transload.launch import Site
from transload.launch.checkpoint import EDGE, fingerprint
from transload.launch.render import render
from transload.launch.write import write

BY_ID = {case.id: case for case in CASES}
CUDA = BY_ID["Qwen3-235B-A22B-2x8xH100-bf16-tp8-pp2"]
ASCEND = BY_ID["GLM-5-2x8x910B3-w4a8-tp8-dp2-ep1"]
GOOD = {
    "nvidia-smi": "echo 81000",
    "npu-smi": "for i in 0 1 2 3 4 5 6 7; do echo '| 0  0 | 0000:C1:00.0 | 0  0 / 0   3161 / 65536 |'; done",
    "hccn_tool": "echo link status: UP; echo ipaddr:10.0.0.1; echo net health status: Success",
    "ip": "echo 2: eth0 inet 10.0.0.1/24 scope global",
    "getent": 'echo "$2 STREAM"',
    "ping": "exit 0",
    "ss": "exit 0",
}


def _run(
    case: Case, tmp_path: Path, tools: dict[str, str], *arguments: str, model: str | None = None, full: bool = False
) -> Callable[[], subprocess.CompletedProcess[str]]:
    checkpoint = Path(model or _checkpoint(tmp_path / "model"))
    prints = {str(checkpoint): fingerprint(checkpoint, full)} if checkpoint.exists() and model is None else {}
    site = Site(addresses=case.site.addresses, interfaces=case.site.interfaces)
    write(render(case.plan(), str(checkpoint), site=site, prints=prints).files, tmp_path / "out")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, body in {**GOOD, **tools}.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_folder / name).chmod(0o755)
    return lambda: subprocess.run(
        ["bash", str(tmp_path / "out" / "preflight.sh"), *arguments],
        env={"PATH": f"{bin_folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def _checkpoint(folder: Path) -> str:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "a name.safetensors").write_bytes(bytes(3 * EDGE))
    (folder / "README.md").write_text("not part of it")
    (folder / ".cache").write_text("nor this")
    return str(folder)


def test_a_node_that_is_right_is_ready(tmp_path: Path) -> None:
    done = _run(CUDA, tmp_path, {}, "node-0")()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[-1] == "node-0: ready"
    assert "ok    address: 10.0.0.1 on eth0" in lines
    assert "ok    checkpoint: 2 files as listed in checkpoint-cuda.sha256" in lines
    assert sum(line.startswith("ok    device") for line in lines) == 8
    assert not [line for line in lines if line.startswith("FAIL")]


@pytest.mark.parametrize(
    ("case", "tool", "said"),
    [
        (CUDA, {"nvidia-smi": "echo 1200"}, "FAIL  device 0: 1200 MiB free, the plan needs"),
        (CUDA, {"nvidia-smi": "echo No devices were found"}, "FAIL  device 0: not found by nvidia-smi"),
        (
            CUDA,
            {"ip": "echo 2: ib0 inet 10.0.0.1/24"},
            "FAIL  interface: 10.0.0.1 is on ib0, the cluster file says eth0",
        ),
        (CUDA, {"ip": "echo 2: eth0 inet 10.9.9.9/24"}, "FAIL  address: no interface of this node has 10.0.0.1"),
        (CUDA, {"ping": "exit 1"}, "FAIL  reach node-1: 10.0.0.2 does not answer to ping"),
        (CUDA, {"ss": "echo LISTEN"}, "FAIL  port 8000: in use"),
        (ASCEND, {"npu-smi": "echo '| 0 | 60000 / 65536 |'"}, "FAIL  device 0: 5536 MB free, the plan needs"),
        (ASCEND, {"hccn_tool": "echo link status: DOWN"}, "FAIL  device 0: its link is down"),
        (ASCEND, {"hccn_tool": "echo link status: UP; echo ipaddr:1; echo fail"}, "does not find its gateway"),
        (ASCEND, {}, "FAIL  devices: /dev/davinci7 is missing"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_is_wrong_on_a_node_is_said(case: Case, tool: dict[str, str], said: str, tmp_path: Path) -> None:
    done = _run(case, tmp_path, tool, "node-0")()
    assert done.returncode == 1
    assert said in done.stdout


def test_a_checkpoint_that_changed_is_found(tmp_path: Path) -> None:
    run = _run(CUDA, tmp_path, {}, "node-0")
    weights = tmp_path / "model" / "a name.safetensors"
    weights.write_bytes(bytes(3 * EDGE - 1))
    assert "a name.safetensors has 3145727 bytes, expected 3145728" in run().stdout
    weights.write_bytes(bytes(3 * EDGE - 1) + b"x")
    assert "a name.safetensors differs from the one that was planned for" in run().stdout
    (tmp_path / "model" / "config.json").unlink()
    assert "FAIL  checkpoint: config.json is missing" in run().stdout


def test_a_change_in_the_middle_needs_whole_hashes(tmp_path: Path) -> None:
    run = _run(CUDA, tmp_path, {}, "--full", "node-0", full=True)
    assert run().returncode == 0
    middle = bytearray(3 * EDGE)
    middle[EDGE + 7] = 1
    (tmp_path / "model" / "a name.safetensors").write_bytes(middle)
    assert "a name.safetensors differs in the middle" in run().stdout


def test_a_checkpoint_that_was_not_at_hand_is_named_by_the_same_hash_everywhere(tmp_path: Path) -> None:
    folder = _checkpoint(tmp_path / "elsewhere")
    done = _run(CUDA, tmp_path, {}, "node-0", model=folder)()
    assert f"Compare on all nodes: {fingerprint(folder).digest[:16]}" in done.stdout


def test_an_unknown_node_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    done = _run(CUDA, tmp_path, {}, "node-7")()
    assert done.returncode == 2
    assert "no node 'node-7'; name one of: node-0 node-1" in done.stderr


def test_a_fingerprint_covers_both_ends_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = Path(_checkpoint(tmp_path / "m"))
    first = fingerprint(folder)
    assert [f.name for f in first.files] == ["a name.safetensors", "config.json"]
    assert first.digest == fingerprint(folder, full=True).digest
    assert first.size == 3 * EDGE + 2
    (folder / "config.json").write_text("[]")
    assert fingerprint(folder).digest != first.digest
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        fingerprint(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no checkpoint files there"):
        fingerprint(tmp_path / "empty")
    (folder / "a\nb").write_text("x")
    with pytest.raises(ConfigError, match="a file name with a line break"):
        fingerprint(folder)
