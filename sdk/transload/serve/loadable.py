"""Whether an engine loads a checkpoint as it lies there; if not, the command that makes one it loads."""

from __future__ import annotations

import shlex
from pathlib import Path

from transload.errors import ConfigError, TransloadError, Unsupported
from transload.serve.complete import check_complete
from transload.serve.engine import InstalledEngine


def check_loads(path: Path, engine: InstalledEngine) -> None:
    """Raises Unsupported with the `transload port` command when the engine does not load the checkpoint.

    Nothing is converted here. Raises ConfigError when there is no checkpoint, FormatError when it is damaged or lacks
    tensors. Releases
    of an engine that Transload does not know are not judged.
    """
    if not path.exists():
        raise ConfigError(f"{path}: there is no such checkpoint")
    check_complete(path)
    from transload import engines
    from transload.inspection import inspect

    try:
        known = engines.find_engine(f"{engine.name}=={engine.release}")
    except ConfigError:
        return
    if known is None:
        return
    found = inspect(path)
    verdict = next(v for v in found.engines if v.name == known.label)
    loaded = {rule.format for rule in known.rules}
    if verdict.runs and (found.format in loaded or (found.format == "plain" and path.is_dir())):
        return
    reason = "; ".join(dict.fromkeys(verdict.reasons.values())) or f"it loads no {found.format} files"
    name = f"{engine.name}=={engine.release}" if engine.name == "vllm-ascend" else engine.name
    raise Unsupported(f"{path}: {engine.name} {engine.version} does not load it: {reason}. {_way(path, name)}")


def _way(path: Path, target: str) -> str:
    """The command, exact when some scheme works."""
    from transload.checkpoint import open as open_checkpoint
    from transload.porting.plan import Options
    from transload.porting.planning import plan_first
    from transload.porting.schemes import parse_schemes
    from transload.porting.target import find_targets

    out = path.with_name(f"{path.stem if path.is_file() else path.name}-{target.split('=')[0]}")
    command = f"transload port {shlex.quote(str(path))} {shlex.quote(str(out))} --to {target}"
    try:
        source, targets = open_checkpoint(path), find_targets(target)
        if not plan_first(source, targets, Options(), None).refusals:
            return f"This makes one that it loads, without changing numbers: {command}"
        for scheme in ("auto", "int4-g32-asym", "int4-g128", "int8-channel-a8"):
            if not plan_first(source, targets, Options(), parse_schemes(scheme)).refusals:
                return f"This makes one that it loads, and reports what it changes: {command} --requantize {scheme}"
    except TransloadError:
        pass
    return f"Ask for what it loads with: {command}"
