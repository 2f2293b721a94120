"""check: a rendered folder judged before a cluster is rented: its commands by the engine, its files by their tools."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transload.errors import ConfigError
from transload.launch import flagtable, live, validators
from transload.launch.ascend_rules import contradictions
from transload.launch.command import EngineCommand
from transload.launch.manifest import Manifest, read_manifest, read_plan
from transload.launch.validators import Skipped
from transload.launch.write import edited, inside
from transload.plan.result import Plan

State = Literal["ok", "bad", "note"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report. subject: a file or process; by: what judged it. note: not checked, or worth knowing."""

    subject: str
    by: str
    state: State
    text: str = ""


_FILES: tuple[tuple[str, str, Callable[[Path, Path], validators.Outcome]], ...] = (
    ("*.sh", "bash, shellcheck", lambda path, folder: validators.shell(path)),
    ("systemd/*.service", "systemd-analyze", validators.systemd_unit),
    ("compose/*.yaml", "compose schema", lambda path, folder: validators.compose(path)),
    ("kubernetes/*.yaml", "kubernetes schemas", lambda path, folder: validators.kubernetes(path)),
    ("router/nginx.conf", "nginx", lambda path, folder: validators.nginx(path)),
)


def check(folder: str | Path, config: str | Path | None = None, python: str | None = None) -> list[Finding]:
    """Every finding about a rendered folder, bad ones included; nothing is started or changed.

    config: a folder with the model's config.json, for the engine's second stage; without it the manifest's model path
    is tried. python: of a vLLM; without it `live.engine_python()`. Raises ConfigError when the folder holds no
    rendering, or another plan than was rendered.
    """
    root = Path(folder)
    manifest, plan = read_manifest(root), read_plan(root)
    if any(not 0 <= p.deployment < len(plan.deployments) for p in manifest.processes):
        raise ConfigError(f"{root}: launch.json has other engines than plan.json; render the plan again")
    return [
        *_belongs(root, manifest),
        *_commands(manifest, plan, config, python),
        *check_files(root, list(manifest.files)),
    ]


def passed(findings: Sequence[Finding]) -> bool:
    """True when nothing is bad."""
    return all(f.state != "bad" for f in findings)


def _belongs(root: Path, manifest: Manifest) -> list[Finding]:
    missing, changed = edited(root, manifest)
    found = [Finding(name, "launch.json", "bad", "was rendered and is not there") for name in missing]
    found += [
        Finding(
            name, "launch.json", "note", "was edited since it was rendered; commands are judged as launch.json has them"
        )
        for name in changed
    ]
    return found or [Finding("all files", "launch.json", "ok", f"{len(manifest.files)} as rendered")]


def by_table(commands: Sequence[EngineCommand], plan: Plan) -> list[Finding]:
    """What the frozen table of each command's planned release says of it."""
    found: list[Finding] = []
    for command, engine in _serving(commands, plan):
        if engine not in flagtable.TABLES:
            found.append(Finding(command.name, "flag table", "note", f"there is none for {engine}"))
            continue
        release, _ = flagtable.table(flagtable.TABLES[engine][0])
        wrong = flagtable.problems(command.argv[2:], engine)
        if engine.startswith("vllm-ascend"):
            wrong += contradictions(command.argv[2:], command.env)
        found += [Finding(command.name, f"flags of vLLM {release}", "bad", text) for text in wrong]
        if not wrong:
            found.append(Finding(command.name, f"flags of vLLM {release}", "ok"))
    return found


def _serving(commands: Sequence[EngineCommand], plan: Plan) -> list[tuple[EngineCommand, str]]:
    """The commands that start vLLM (not those that only join Ray), with the plan's engine."""
    return [(c, plan.deployments[c.deployment].engine) for c in commands if c.argv[:2] == ("vllm", "serve")]


def _commands(manifest: Manifest, plan: Plan, config: str | Path | None, python: str | None) -> list[Finding]:
    """The frozen tables, and both stages by a vLLM where there is one."""
    rows = _serving(manifest.commands(), plan)
    serving, engines = [c for c, _ in rows], [e for _, e in rows]
    folders = _config_folders(manifest, config, serving, plan)
    return by_table(serving, plan) + _live(serving, engines, folders, python)


def _config_folders(
    manifest: Manifest, config: str | Path | None, serving: Sequence[EngineCommand], plan: Plan
) -> list[str | None]:
    folders: list[str | None] = []
    for command in serving:
        platform = plan.deployments[command.deployment].platform
        own = next((m.path for m in manifest.models if m.platform == platform), "")
        place = Path(config) if config is not None else Path(own)
        place = place.parent if place.name == "config.json" else place
        folders.append(str(place.resolve()) if (place / "config.json").is_file() else None)
    return folders


def _live(
    serving: Sequence[EngineCommand], engines: Sequence[str], folders: Sequence[str | None], python: str | None
) -> list[Finding]:
    program = python or live.engine_python()
    if program is None:
        return [Finding("commands", "vLLM's parser", "note", f"no vllm on PATH; {live.VARIABLE} may name its python")]
    version, verdicts = live.judge(program, serving, folders)
    found = []
    for command, engine, folder, verdict in zip(serving, engines, folders, verdicts, strict=True):
        worse: State = "bad" if _release(engine) == version.split(".")[:2] else "note"
        if verdict.parser is not None:
            found.append(Finding(command.name, f"parser of vLLM {version}", worse, verdict.parser))
            continue
        found.append(Finding(command.name, f"parser of vLLM {version}", "ok"))
        if folder is None:
            text = "not checked: config.json is not here; --config names it"
            found.append(Finding(command.name, f"configuration of vLLM {version}", "note", text))
        elif verdict.config is not None:
            found.append(Finding(command.name, f"configuration of vLLM {version}", worse, verdict.config))
        else:
            found.append(Finding(command.name, f"configuration of vLLM {version}", "ok", _facts(verdict)))
    return found


def _release(engine: str) -> list[str]:
    """The vLLM that an engine of a plan is or extends: ["0", "32"]."""
    name, _ = flagtable.TABLES.get(engine, ("", None))
    return flagtable.table(name)[0].split(".")[:2] if name else []


def _facts(verdict: live.Verdict) -> str:
    facts = verdict.facts or {}
    return (
        f"{facts.get('world_size')} ranks a replica, {facts.get('local_world_size')} here; {facts.get('layers')} layers"
    )


def check_files(root: Path, names: Sequence[str]) -> list[Finding]:
    """What the readers of rendered files say of those that are there; names that lead outside are left out."""
    found: list[Finding] = []
    skipped: dict[str, str] = {}
    for name in names:
        for pattern, by, judge in _FILES:
            if not fnmatch.fnmatch(name, pattern) or not inside(root, name):
                continue
            outcome = judge(root / name, root)
            if isinstance(outcome, Skipped):
                skipped[by] = outcome.reason
            elif outcome:
                found += [Finding(name, by, "bad", text) for text in outcome]
            else:
                found.append(Finding(name, by, "ok"))
    if validators.shellcheck_missing():
        skipped["shellcheck"] = "is not installed: pip install 'transload[check]'"
    return found + [Finding("files", by, "note", f"not checked: {reason}") for by, reason in skipped.items()]
