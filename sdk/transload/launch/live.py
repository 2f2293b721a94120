"""Command lines judged by an installed vLLM: its parser, then its configuration, in a child of its own python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from transload.errors import BackendError, ConfigError
from transload.launch.command import EngineCommand

VARIABLE = "TRANSLOAD_VLLM_PYTHON"
TIMEOUT = 600  # seconds: importing vLLM takes most of it on a busy machine


@dataclass(frozen=True, slots=True)
class Verdict:
    """What vLLM says of one command. parser and config: its complaint, or None. facts: None when config was not asked.

    facts: world_size, local_world_size, data_parallel_size, data_parallel_size_local, max_model_len, kv_heads and
    layers of the first rank, quantization.
    """

    parser: str | None
    config: str | None
    facts: Mapping[str, object] | None


def engine_python() -> str | None:
    """The python of an installed vLLM: the variable's, or the one that `vllm` on PATH runs in; None without any."""
    named = os.environ.get(VARIABLE)
    if named:
        if shutil.which(named) is None:
            raise ConfigError(f"{VARIABLE}={named}: there is no such program")
        return named
    program = shutil.which("vllm")
    if program is None:
        return None
    try:
        with Path(program).open("rb") as f:
            first = f.readline(512)
    except OSError:
        return None
    words = first.decode("utf-8", "replace").removeprefix("#!").split()
    python = words[-1] if first.startswith(b"#!") and words else ""
    return shutil.which(python) if "python" in python else None


def judge(
    python: str, commands: Sequence[EngineCommand], folders: Sequence[str | None], timeout: float = TIMEOUT
) -> tuple[str, list[Verdict]]:
    """(vLLM's version, its verdict on every command).

    folders: where each command's config.json is, for the second stage; None leaves it out. Raises BackendError when
    vLLM cannot be started, does not answer in time or breaks off.
    """
    asked = [
        {"argv": list(c.argv[2:]), "folder": folder, "env": _partition(c)}
        for c, folder in zip(commands, folders, strict=True)
    ]
    answers = _answers(python, json.dumps({"commands": asked}), timeout, len(asked) + 1)
    verdicts = [Verdict(a["parser"], a["config"], a["facts"]) for a in answers[1:]]
    return str(answers[0]["version"]), verdicts


def _partition(command: EngineCommand) -> dict[str, str]:
    name = "VLLM_PP_LAYER_PARTITION"
    return {name: command.env[name]} if name in command.env else {}


def _answers(python: str, question: str, timeout: float, wanted: int) -> list[dict[str, Any]]:
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    with as_file(files("transload.launch") / "in_engine.py") as script:
        try:
            done = subprocess.run(
                [python, str(script)],
                input=question,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                env=env,
            )
        except subprocess.TimeoutExpired as error:
            raise BackendError(f"{python}: vLLM did not answer within {timeout:g} s") from error
        except OSError as error:
            raise BackendError(f"{python}: cannot be started: {error.strerror}") from error
    lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if len(lines) != wanted:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BackendError(
            f"{python}: vLLM broke off after {max(len(lines) - 1, 0)} of {wanted - 1} commands: {last:.300}"
        )
    return [json.loads(line) for line in lines]
