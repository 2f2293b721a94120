"""The command line: what it prints, what it refuses, and that it starts without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from gguf_model import CASES, build
from typer.testing import CliRunner

from transload import cli


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GGUF with weights of five block types."""
    path = tmp_path_factory.mktemp("cli") / "tiny.gguf"
    build(next(c for c in CASES if c.model_type == "qwen2"), path)
    return path


def ask(*arguments: object) -> tuple[int, str]:
    """Exit code and output of a command, as `transload` itself would end."""
    result = subprocess.run(
        [sys.executable, "-m", "transload", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result.returncode, result.stdout + result.stderr


def ask_json(*arguments: object) -> Any:
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_help_lists_every_command_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom transload import cli\nsys.argv = ['transload', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\nsys.exit(3 if 'torch' in sys.modules else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for command in ("devices", "inspect", "port", "verify", "run", "plan", "bench"):
        assert command in result.stdout


def test_inspect_counts_every_module_and_names_who_runs_it(model: Path) -> None:
    found = ask_json("inspect", model)
    assert found["format"] == "gguf"
    assert found["architecture"] == "Qwen2ForCausalLM"
    assert sum(g["count"] for g in found["groups"] if g["role"].endswith("mlp.up_proj")) == 2
    assert any(v["name"] == "cpu" and v["runs"] for v in found["backends"])
    vllm = next(v for v in found["engines"] if v["name"].startswith("vllm 0.32"))
    assert not vllm["runs"]
    assert "not gguf" in " ".join(vllm["reasons"].values())


def test_devices_gives_a_reason_for_every_backend_that_is_missing() -> None:
    found = {b["backend"]: b for b in ask_json("devices")}
    assert {"cpu", "cuda", "ascend"} <= set(found)
    assert found["cpu"]["unavailable"] is None
    assert found["cpu"]["devices"][0]["memory"] > 0
    assert all(b["unavailable"] or b["devices"] for b in found.values())


def test_port_refuses_before_it_writes_and_names_the_flag(model: Path, tmp_path: Path) -> None:
    code, output = ask("port", model, tmp_path / "out", "--to", "compressed-tensors")
    assert code == 1
    assert "--requantize" in output
    assert not list(tmp_path.iterdir())


def test_an_exact_port_verifies(model: Path, tmp_path: Path) -> None:
    report = ask_json("port", model, tmp_path / "out", "--to", "transload")
    assert report["exact"]
    assert ask_json("verify", model, tmp_path / "out")["equal"]


def test_verify_fails_when_numbers_changed(model: Path, tmp_path: Path) -> None:
    report = ask_json("port", model, tmp_path / "out", "--to", "compressed-tensors", "--requantize", "int4-g32")
    assert not report["exact"]
    code, output = ask("verify", model, tmp_path / "out")
    assert code == 1
    assert "differ" in output


def test_run_reports_what_executed(model: Path) -> None:
    answer = ask_json("run", model, "--prompt", "hello", "--max-new-tokens", 3, "--scheme", "w4a8")
    assert 1 <= len(answer["tokens"]) <= 3
    assert {m["executed"][-2:] for m in answer["report"]["modules"] if m["kind"] == "linear"} == {"A8"}


@pytest.mark.parametrize("command", ["inspect", "run"])
def test_a_missing_file_is_one_sentence(command: str, tmp_path: Path) -> None:
    extra = ("--prompt", "x") if command == "run" else ()
    code, output = ask(command, tmp_path / "nothing.gguf", *extra)
    assert code == 1
    assert "nothing.gguf" in output


def test_an_error_is_json_when_json_is_asked(tmp_path: Path) -> None:
    code, output = ask("inspect", tmp_path / "nothing", "--json")
    assert code == 1
    assert set(json.loads(output)) == {"error", "message"}
