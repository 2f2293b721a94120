"""A real vLLM refuses what is wrong, and its absence or failure is said in a sentence."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from launch.plans import CASES, model
from transload.errors import BackendError, ConfigError
from transload.launch import EngineCommand, commands, live

PYTHON = os.environ.get(live.VARIABLE)
TWO = next(c for c in CASES if c.id == "Qwen3-235B-A22B-2x8xH100-bf16-tp8-pp2")


def _commands() -> tuple[EngineCommand, ...]:
    return commands(TWO.plan(), "/models/m", site=TWO.site)


def _with(command: EngineCommand, *changes: str) -> EngineCommand:
    """The command with options replaced or added."""
    argv = list(command.argv)
    for option, value in zip(changes[::2], changes[1::2], strict=True):
        if option in argv:
            argv[argv.index(option) + 1] = value
        else:
            argv += [option, value]
    return replace(command, argv=tuple(argv))


@pytest.mark.skipif(not PYTHON, reason=f"{live.VARIABLE} does not name the python of a vLLM installation")
def test_what_is_wrong_is_refused_at_its_stage(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model("Qwen3-235B-A22B")))
    head, worker = _commands()
    cases = (
        (_with(head, "--tensor-paralel-size", "8"), "parser", "unrecognized arguments"),
        (_with(head, "--kv-cache-dtype", "fp9"), "parser", "invalid choice: 'fp9'"),
        (_with(head, "--compilation-config", "{"), "parser", "compilation-config"),
        (_with(head, "--tensor-parallel-size", "6"), "config", "attention heads (64) must be divisible"),
        (_with(head, "--gpu-memory-utilization", "1.5"), "config", "less than or equal to 1"),
        (_with(head, "--max-model-len", "1000000"), "config", "max_model_len"),
        (_with(head, "--nnodes", "3"), "config", "evenly divide"),
        (_with(worker, "--node-rank", "2"), "config", "`--node-rank` must be between 0 and 1"),
        (head, "good", ""),
    )
    _, verdicts = live.judge(str(PYTHON), [c for c, _, _ in cases], [str(tmp_path)] * len(cases))
    for (_, stage, said), verdict in zip(cases, verdicts, strict=True):
        found = {"parser": verdict.parser, "config": verdict.config, "good": verdict.parser or verdict.config}[stage]
        if stage == "good":
            assert found is None
        else:
            assert said in str(found), verdict


def test_a_python_without_vllm_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'vllm'\" >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(BackendError, match=r"broke off after 0 of 2 commands: ModuleNotFoundError.*vllm"):
        live.judge(str(python), _commands(), [None, None])


def test_a_python_that_hangs_is_given_up(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    with pytest.raises(BackendError, match=r"did not answer within 0\.2 s"):
        live.judge(str(python), _commands(), [None, None], timeout=0.2)


def test_the_engine_s_python_is_named_or_found_beside_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(live.VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="there is no such program"):
        live.engine_python()
    monkeypatch.delenv(live.VARIABLE)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert live.engine_python() is None
    for name, text in (("python3", "#!/bin/sh\n"), ("vllm", f"#!{tmp_path}/python3\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    assert live.engine_python() == f"{tmp_path}/python3"
