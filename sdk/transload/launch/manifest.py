"""launch.json: what was rendered, from which plan and checkpoint, and the processes that `transload launch` starts."""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from transload.errors import ConfigError
from transload.launch.command import EngineCommand, Role
from transload.plan.result import Plan

FILE = "launch.json"
PLAN_FILE = "plan.json"
LARGEST = 64 << 20


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelFiles(_Value):
    """A checkpoint as the nodes of one platform see it; vendors may need different ones.

    platform: "cuda", "ascend" or "cpu". digest: `checkpoint.fingerprint(path).digest` where the plan was rendered, None
    when the checkpoint was not there.
    """

    platform: str
    path: str
    digest: str | None = None


class Process(_Value):
    """An EngineCommand as data; see there for the fields."""

    name: str
    node: str
    role: Role
    instance: int
    deployment: int
    replica: int
    address: str
    head_address: str
    port: int
    health_path: str
    devices: tuple[int, ...]
    env: dict[str, str]
    setup: tuple[tuple[str, ...], ...] = ()
    argv: tuple[str, ...]

    @classmethod
    def of(cls, command: EngineCommand) -> Process:
        """The process that a command describes."""
        return cls.model_validate(
            {name: getattr(command, name) for name in cls.model_fields} | {"env": {**command.env}}
        )

    def command(self) -> EngineCommand:
        """The command again."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "name"}
        return EngineCommand(**values)


class Manifest(_Value):
    """What a rendered folder holds.

    name: what clients call the model (--served-model-name). models: its checkpoints, one for each platform. nodes:
    every node of the plan in a fixed order, the k of `transload launch DIR --node k`. plan_digest: SHA-256 of plan.json
    in the folder. engines: what the plan was made for. files: SHA-256 of every other file as rendered, by name, which
    tells files that were edited since or belong to an older rendering.
    """

    version: int = 1
    transload: str
    plan_digest: str
    name: str
    models: tuple[ModelFiles, ...]
    engines: tuple[str, ...]
    formats: tuple[str, ...]
    nodes: tuple[str, ...]
    processes: tuple[Process, ...]
    files: dict[str, str] = {}

    def to_json(self) -> str:
        """The manifest as JSON text, keys in a fixed order, ending in a newline."""
        return self.model_dump_json(indent=2) + "\n"

    def commands(self) -> tuple[EngineCommand, ...]:
        """Every process of the plan."""
        return tuple(p.command() for p in self.processes)

    def on_node(self, node: int | str) -> tuple[EngineCommand, ...]:
        """The processes of one node, by its name or its number. Raises ConfigError naming the nodes that there are."""
        name = self.nodes[node] if isinstance(node, int) and 0 <= node < len(self.nodes) else node
        if isinstance(node, str) and node not in self.nodes and node.isdecimal() and int(node) < len(self.nodes):
            name = self.nodes[int(node)]
        if name not in self.nodes:
            known = ", ".join(f"{k} ({n})" for k, n in enumerate(self.nodes[:16]))
            more = f" and {len(self.nodes) - 16} more" if len(self.nodes) > 16 else ""
            raise ConfigError(f"node {node}: the plan has {len(self.nodes)} nodes: {known}{more}")
        return tuple(p.command() for p in self.processes if p.node == name)


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a rendered folder.

    Raises ConfigError when the folder has none, when it is not one, or when plan.json beside it is another plan.
    """
    path = Path(folder) / FILE
    try:
        if path.stat().st_size > LARGEST:
            raise ConfigError(f"{path}: larger than a manifest may be")
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        what = "write it with: transload plan render" if isinstance(error, FileNotFoundError) else "cannot be read"
        raise ConfigError(f"{path}: {error.strerror}; {what}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(p) for p in first["loc"]) or "the file"
        raise ConfigError(f"{path}: {place}: {first['msg']}; render the plan again") from error
    _same_plan(Path(folder) / PLAN_FILE, manifest)
    return manifest


def _same_plan(path: Path, manifest: Manifest) -> None:
    try:
        found = digest(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}; render the plan again") from error
    if found != manifest.plan_digest:
        raise ConfigError(f"{path}: is not the plan that {FILE} was rendered from; render it again")


def read_plan(folder: str | Path) -> Plan:
    """The plan of a rendered folder. Raises ConfigError when it is not one."""
    return plan_from(Path(folder) / PLAN_FILE)


def plan_from(path: str | Path) -> Plan:
    """A plan as `transload plan --save` wrote it. Raises ConfigError naming the file and what is wrong."""
    try:
        return Plan.from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValidationError, ValueError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ConfigError(f"{path}: not a plan written by `transload plan --save`: {detail:.160}") from error


def digest(text: str) -> str:
    """SHA-256 of a text file's bytes, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()
