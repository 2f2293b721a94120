"""Rendered files judged by the tools that will read them: bash, shellcheck, systemd, nginx, schemas of YAML formats.

Every function returns the problems it found, or a Skipped with the reason when its tool is not installed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

_TIMEOUT = 60  # seconds
_INSTALL = "pip install 'transload[check]'"


@dataclass(frozen=True, slots=True)
class Skipped:
    """Why a check was not made."""

    reason: str


Outcome = list[str] | Skipped


def shell(path: Path) -> Outcome:
    """bash reads the script; shellcheck, when it is installed, finds nothing to say about it."""
    bash = shutil.which("bash")
    if bash is None:
        return Skipped("bash is not installed")
    found = _said([bash, "-n", str(path)], path)
    program = shutil.which("shellcheck") or shutil.which(str(Path(sys.executable).with_name("shellcheck")))
    if found or program is None:
        return found
    # SC2016 asks about $ in single quotes, which is what keeps a path's own $ as it is.
    return _said([program, "--shell=bash", "--exclude=SC2016", "--format=gcc", str(path)], path)


def shellcheck_missing() -> bool:
    """True when only bash's syntax can be checked."""
    return shutil.which("shellcheck") is None and not Path(sys.executable).with_name("shellcheck").exists()


def systemd_unit(path: Path, folder: Path) -> Outcome:
    """systemd-analyze verify, with the scripts looked for in `folder` instead of where they will be installed."""
    program = shutil.which("systemd-analyze")
    if program is None:
        return Skipped("systemd-analyze is not installed")
    text = path.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as scratch:
        link = Path(scratch) / "rendered"
        link.symlink_to(folder.resolve())
        unit = Path(scratch) / path.name
        unit.write_text(re.sub(r"^ExecStart=\S*?/shell/", f"ExecStart={link}/shell/", text, flags=re.MULTILINE))
        said = _said([program, "verify", "--man=no", str(unit)])
    # It loads units that the host has too, and may complain about those.
    return [line for line in said if path.name in line or path.stem in line]


def nginx(path: Path) -> Outcome:
    """nginx -t; names of nodes that only the cluster resolves are replaced by an address."""
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if program is None:
        return Skipped("nginx is not installed")
    text = re.sub(r"^( *server )(\S+):(\d+)( weight)", r"\g<1>127.0.0.1:\3\4", path.read_text("utf-8"), flags=re.M)
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / "nginx.conf"
        config.write_text(text.replace("/tmp/transload-router", f"{scratch}/router"))
        said = _said([program, "-t", "-q", "-p", scratch, "-e", "stderr", "-c", str(config)])
    return [line for line in said if "[emerg]" in line or "[warn]" in line or "[error]" in line]


def compose(path: Path) -> Outcome:
    """The compose specification's own schema."""
    documents = _documents(path)
    if isinstance(documents, str):
        return [documents]
    return _by_schema(documents[0], _schema("compose-spec.json"))


def kubernetes(path: Path) -> Outcome:
    """Kubernetes' own schemas, strictly; LeaderWorkerSet's, and Kubernetes' for its pod templates."""
    try:
        import kubernetes_validate
    except ImportError:
        return Skipped(f"kubernetes-validate is not installed: {_INSTALL}")
    documents = _documents(path)
    if isinstance(documents, str):
        return [documents]
    found: list[str] = []
    for document in documents:
        objects = [document]
        if document.get("kind") == "LeaderWorkerSet":
            found += _found(_by_schema(document, _schema("leaderworkerset-v1.json")))
            objects = _templates(document)
        for item in objects:
            try:
                kubernetes_validate.validate(item, kubernetes_validate.latest_version(), strict=True)
            except (kubernetes_validate.ValidationError, kubernetes_validate.SchemaNotFoundError) as error:
                found.append(f"{document.get('kind')}: {_first_line(error)}")
    return found


def _templates(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The pod templates of a LeaderWorkerSet, as objects of Kubernetes."""
    template = document["spec"]["leaderWorkerTemplate"]
    named = [template[name] for name in ("leaderTemplate", "workerTemplate") if name in template]
    return [{"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": t} for t in named]


def _by_schema(document: object, schema: dict[str, Any]) -> Outcome:
    try:
        from jsonschema import validators
    except ImportError:
        return Skipped(f"jsonschema is not installed: {_INSTALL}")
    judge = validators.validator_for(schema)(schema)
    return [
        f"{'.'.join(map(str, e.absolute_path)) or 'document'}: {e.message:.200}" for e in judge.iter_errors(document)
    ]


def _found(outcome: Outcome) -> list[str]:
    return [outcome.reason] if isinstance(outcome, Skipped) else outcome


def _schema(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((files("transload.launch") / "data" / name).read_text(encoding="utf-8"))
    return schema


def _documents(path: Path) -> list[dict[str, Any]] | str:
    try:
        documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        return f"not valid YAML: {' '.join(str(error).split())[:200]}"
    if not documents or not all(isinstance(d, dict) for d in documents):
        return "not a YAML mapping"
    return documents


def _said(command: Sequence[str], path: Path | None = None) -> list[str]:
    """Lines that a checker prints, without the path that it was given; empty when it is content."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False, errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        return [f"{command[0]}: {error}"]
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if path is not None:
        lines = [line.replace(f"{path}:", "line ", 1).replace("line  line", "line") for line in lines]
    return lines or ([f"{command[0]}: exit status {done.returncode}"] if done.returncode else [])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:240]
