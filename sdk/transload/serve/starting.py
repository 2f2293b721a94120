"""From an EngineCommand to what is really started here: program, arguments, environment of this machine."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transload.errors import ConfigError
from transload.launch import EngineCommand
from transload.serve.engine import InstalledEngine

_BIND = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True, slots=True)
class Start:
    """One process to start on this machine. peers: the other nodes of its instance (name -> address), head first."""

    command: EngineCommand
    argv: tuple[str, ...]
    env: Mapping[str, str]
    setup: tuple[tuple[str, ...], ...]
    log: Path
    peers: Mapping[str, str]
    platform: str
    drains: bool  # the engine finishes running requests by itself when it is asked to end
    kv_tokens: int | None = None  # what the plan predicts for the instance

    @property
    def name(self) -> str:
        """The process's name."""
        return self.command.name

    @property
    def model(self) -> str:
        """The name that requests give as `model`; "" where the command does not say it."""
        at = self.argv.index("--served-model-name") if "--served-model-name" in self.argv else -1
        return self.argv[at + 1] if at >= 0 else ""

    @property
    def head(self) -> bool:
        """True for the process that serves HTTP."""
        return self.command.role == "head"


def start_of(
    command: EngineCommand,
    engine: InstalledEngine,
    folder: Path,
    *,
    drain: float,
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    peers: Mapping[str, str] | None = None,
    kv_tokens: int | None = None,
) -> Start:
    """A command made ready for this machine. folder: where its log goes; env: overrides everything else.

    Raises ConfigError when the machine has too few cores for its workers, NoBackend when a program is missing.
    """
    argv = (*engine.program(command.argv[0]), *command.argv[1:])
    if command.argv[0] == "vllm":
        argv = (*argv, *arguments)
        if engine.drains and not any(a.split("=")[0] == "--shutdown-timeout" for a in argv):
            argv = (*argv, "--shutdown-timeout", str(math.ceil(drain)))
    return Start(
        command=command,
        argv=argv,
        env={**_inherited(engine, folder), **command.env, **_cores(command, engine), **(env or {})},
        setup=tuple((*engine.program(line[0]), *line[1:]) for line in command.setup),
        log=folder / f"{command.name}.log",
        peers=peers or {},
        platform=engine.platform,
        drains="--shutdown-timeout" in argv,
        kv_tokens=kv_tokens,
    )


def _inherited(engine: InstalledEngine, folder: Path) -> dict[str, str]:
    """This process's environment, as the engine's own interpreter should see it."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "__PYVENV_LAUNCHER__")}
    env["PATH"] = os.pathsep.join([str(engine.python.parent), env.get("PATH", os.defpath)])
    env["PYTHONUNBUFFERED"] = "1"
    env.pop("VIRTUAL_ENV", None)
    env.setdefault("HF_HUB_OFFLINE", "1")  # the checkpoint is a folder here; nothing is to be fetched
    if not engine.metadata:
        env["PYTHONPATH"] = os.pathsep.join([str(_metadata(engine, folder)), *filter(None, [env.get("PYTHONPATH")])])
    return env


def _metadata(engine: InstalledEngine, folder: Path) -> Path:
    """A folder with the metadata of a distribution "vllm", which vllm-cpu lacks and the vllm command asks for.

    The version must end in +cpu: that is how vLLM detects a CPU.
    """
    version = f"{engine.version}+cpu" if engine.platform == "cpu" else engine.version
    info = folder / "metadata" / f"vllm-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n", encoding="utf-8")
    (info / "RECORD").touch()
    return info.parent


def _cores(command: EngineCommand, engine: InstalledEngine) -> dict[str, str]:
    """Cores for CPU workers where the engine's own choice, one NUMA node for each, cannot be met."""
    workers = len(command.devices)
    if engine.platform != "cpu" or workers <= _numa_nodes() or _BIND in {**os.environ, **command.env}:
        return {}
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if len(cores) < workers:
        raise ConfigError(
            f"{command.name}: {workers} CPU workers need a core each, and this process may use {len(cores)}; "
            "plan with a smaller --tp"
        )
    share = len(cores) // workers
    groups = [cores[i * share : (i + 1) * share] for i in range(workers)]
    return {_BIND: "|".join(",".join(str(c) for c in group) for group in groups)}


def _numa_nodes() -> int:
    return max(1, sum(1 for _ in Path("/sys/devices/system/node").glob("node[0-9]*")))
