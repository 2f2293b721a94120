"""Everything that is checked before an engine starts, and the processes to start on this machine afterwards."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from transload.errors import ConfigError
from transload.launch import EngineCommand, Site, commands, read_manifest, read_plan
from transload.launch.checkpoint import fingerprint
from transload.launch.environment import INTERFACES
from transload.launch.manifest import Manifest
from transload.plan.result import Plan
from transload.plan.units import show_bytes
from transload.serve.engine import InstalledEngine, find_engine
from transload.serve.health import check_port
from transload.serve.loadable import check_loads
from transload.serve.local import local_plan
from transload.serve.network import interface_of
from transload.serve.starting import Start, start_of

WILDCARDS = ("", "0.0.0.0", "::", "*")


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a caller may ask for.

    python: the engine's. context .. kv_cache (bytes on each device) shape the plan that is made when none is given.
    drain: seconds. unchecked: start what the table of engines says is not loaded. arguments: appended to the engine's
    command line; env: on top of everything.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    python: Path | None = None
    served_name: str | None = None
    context: str | int = "8k"
    concurrency: int = 16
    tp: int | None = None
    kv_cache: int | None = None
    drain: float = 60.0
    unchecked: bool = False
    arguments: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def serve_starts(path: Path, plan: Plan | None, wishes: Wishes, folder: Path) -> tuple[Start, ...]:
    """The processes of `transload serve`: every instance of a plan for one machine, or of a plan made here.

    folder: for logs, created. Raises a TransloadError that says what is wrong, before anything is started.
    """
    platform = None if plan is None else _one_machine(plan)
    engine = find_engine(wishes.python, platform)
    if not wishes.unchecked:
        check_loads(path, engine)
    if plan is None:
        plan = local_plan(
            path, engine, context=wishes.context, concurrency=wishes.concurrency, tp=wishes.tp, kv_cache=wishes.kv_cache
        )
    else:
        _check_same(plan, path)
    _check_engine([d.engine for d in plan.deployments], engine)
    if wishes.kv_cache is not None and engine.platform != "cpu":  # on a CPU the plan says it
        wishes = replace(wishes, arguments=(*wishes.arguments, "--kv-cache-memory-bytes", str(wishes.kv_cache)))
    reach = "127.0.0.1" if wishes.host in WILDCARDS else wishes.host
    nodes = {rank.node for rank in plan.ranks}
    site = Site(
        addresses=dict.fromkeys(nodes, reach), host=wishes.host or "0.0.0.0", port=wishes.port,
        served_name=wishes.served_name,
    )  # fmt: skip
    found = commands(plan, str(path.absolute()), site=site)
    return _starts(found, found, plan, engine, wishes, folder)


def launch_starts(rendered: Path, node: int | str, wishes: Wishes, folder: Path) -> tuple[Start, ...]:
    """The processes of one node of a rendered plan. Raises as `serve_starts` does."""
    manifest, plan = read_manifest(rendered), read_plan(rendered)
    own = manifest.on_node(node)
    planned = {(r.deployment, r.replica) for r in plan.ranks}
    if {(c.deployment, c.replica) for c in manifest.commands()} != planned:
        raise ConfigError(f"{rendered}: launch.json has other instances than plan.json; render the plan again")
    platforms = {plan.deployments[c.deployment].platform for c in own}
    if len(platforms) != 1:
        raise ConfigError(f"{rendered}: node {node} serves {' and '.join(sorted(platforms))}; start them one by one")
    platform = platforms.pop()
    engine = find_engine(wishes.python, platform)
    _check_engine([plan.deployments[c.deployment].engine for c in own], engine)
    _check_checkpoint(manifest, platform)
    for path in set() if wishes.unchecked else {_model_of(c) for c in own} - {None}:
        check_loads(Path(str(path)), engine)
    own = tuple(_with_interface(c, platform) for c in own)
    return _starts(own, manifest.commands(), plan, engine, wishes, folder)


def _starts(
    own: Sequence[EngineCommand],
    every: Sequence[EngineCommand],
    plan: Plan,
    engine: InstalledEngine,
    wishes: Wishes,
    folder: Path,
) -> tuple[Start, ...]:
    for command in own:
        _check_ports(command)
    _check_folder(folder)
    return tuple(
        start_of(
            command,
            engine,
            folder,
            drain=wishes.drain,
            arguments=wishes.arguments,
            env=wishes.env,
            peers=_peers(command, every),
            kv_tokens=plan.deployments[command.deployment].kv_tokens,
        )
        for command in own
    )


def _one_machine(plan: Plan) -> str:
    """The plan's platform. Raises ConfigError for a plan of several machines or vendors."""
    plan.require()
    nodes, platforms = {r.node for r in plan.ranks}, {d.platform for d in plan.deployments}
    if len(nodes) != 1:
        raise ConfigError(
            f"the plan is for {len(nodes)} nodes ({', '.join(sorted(nodes)[:4])}), and `transload serve` starts one "
            "machine: write its files with `transload plan render`, and on every node: transload launch DIR --node K"
        )
    if len(platforms) != 1:
        raise ConfigError(f"the plan is for {' and '.join(sorted(platforms))}: render it, and launch each by itself")
    return platforms.pop()


def _check_engine(planned: Sequence[str], engine: InstalledEngine) -> None:
    for label in planned:
        if not engine.serves(label):
            raise ConfigError(
                f"the plan was made for {label}, and {engine.label} is installed: plan again with --engine "
                f"{engine.name}=={engine.release}, or install {label}"
            )


def _check_same(plan: Plan, path: Path) -> None:
    """The weights that the plan counted are those of the checkpoint, to two percent."""
    from transload.plan.assemble import module_places
    from transload.plan.catalogue import default_constants
    from transload.plan.engines import engine_for
    from transload.plan.fit import Fitter
    from transload.plan.sources import load_model
    from transload.plan.workload import Workload

    platform = plan.deployments[0].platform
    engine = engine_for(platform, plan.deployments[0].engine)
    fitter = Fitter(load_model(str(path)), engine, Workload(context=plan.context), default_constants()[platform], 0.9)
    now, then = module_places(fitter), plan.modules
    here, planned = sum(m.size for m in now), sum(m.size for m in then)
    if [m.name for m in now] != [m.name for m in then] or abs(here - planned) > 0.02 * planned:
        raise ConfigError(
            f"{path}: is not the checkpoint that the plan was made for, or changed since: the plan counts "
            f"{show_bytes(planned)} in {len(then)} modules, the checkpoint has {show_bytes(here)} in {len(now)}; plan "
            "again"
        )


def _check_checkpoint(manifest: Manifest, platform: str) -> None:
    """The checkpoint is here, and is the one that was rendered for, by hash."""
    for model in manifest.models:
        if model.platform != platform:
            continue
        if not Path(model.path).exists():
            raise ConfigError(f"{model.path}: the plan's checkpoint is not on this node; copy it there")
        if model.digest is not None and fingerprint(model.path).digest != model.digest:
            raise ConfigError(
                f"{model.path}: is not the checkpoint that the plan was rendered for, or changed since (its hash "
                "differs); ./preflight.sh names the file; copy the right files, or plan and render again"
            )


def _model_of(command: EngineCommand) -> str | None:
    return command.argv[2] if command.argv[:2] == ("vllm", "serve") and len(command.argv) > 2 else None


def _check_ports(command: EngineCommand) -> None:
    if command.role != "head":
        return
    host = _option(command, "--host") or "0.0.0.0"
    check_port(host, command.port, f"{command.name}: its API", "--port")
    master = _option(command, "--master-port")
    if master is not None:
        check_port(
            command.address, int(master), f"{command.name}: where its nodes meet", "--master-port when rendering"
        )


def _option(command: EngineCommand, name: str) -> str | None:
    at = command.argv.index(name) if name in command.argv else -1
    return command.argv[at + 1] if 0 <= at < len(command.argv) - 1 else None


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.part"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"{folder}: logs cannot be written there: {error.strerror}; give --logs FOLDER") from error


def _peers(command: EngineCommand, every: Sequence[EngineCommand]) -> dict[str, str]:
    """The nodes that this process hears from: all others on the head, the head on all others."""
    others = [c for c in every if c.instance == command.instance and c.node != command.node]
    heard = others if command.role == "head" else [c for c in others if c.role == "head"]
    return {c.node: c.address for c in heard}


def _with_interface(command: EngineCommand, platform: str) -> EngineCommand:
    """Names the interface of this node's address, where the plan did not and the engine must know it."""
    names = INTERFACES[platform]
    if "VLLM_HOST_IP" not in command.env or any(name in command.env for name in names):
        return command
    address = command.env["VLLM_HOST_IP"]
    interface = interface_of(address)
    if interface is None:
        raise ConfigError(
            f"{command.name}: no interface of this machine ({socket.gethostname()}) has the address {address} of node "
            f"{command.node}: start this on that node, or correct the address in the cluster file"
        )
    return replace(command, env={**command.env, **dict.fromkeys(names, interface)})
