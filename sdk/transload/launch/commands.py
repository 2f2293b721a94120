"""From a plan to processes: one EngineCommand for each, for renderers, checks and `transload serve` alike."""

from __future__ import annotations

from collections.abc import Mapping

from transload.errors import ConfigError
from transload.launch.command import EngineCommand
from transload.launch.environment import environment
from transload.launch.flags import node_flags, serve_flags
from transload.launch.site import Site
from transload.launch.topology import Instance, NodePart, instances
from transload.plan.engines import check_engine_name
from transload.plan.result import Plan

HEALTH_PATH = "/health"


def commands(
    plan: Plan, model_path: str | Mapping[str, str], engine_version: str | None = None, site: Site | None = None
) -> tuple[EngineCommand, ...]:
    """Every process that the plan needs, node by node within an instance, heads first.

    model_path: the checkpoint folder as the nodes see it, or one for each platform ({"cuda": .., "ascend": ..}).
    engine_version: "0.32" or "vllm==0.32", to be sure that the plan was made for it; None takes the plan's.
    Raises DoesNotFit for a plan that does not fit, ConfigError when the plan was made for another engine or its nodes
    contradict each other.
    """
    site = site or Site()
    _check_version(plan, engine_version)
    _check_nodes(plan, site)
    name = argument("model name", site.served_name or plan.model)
    return tuple(
        _command(instance, part, path_for(instance, model_path), name, site)
        for instance in instances(plan, site.form)
        for part in instance.parts
    )


def path_for(instance: Instance, model_path: str | Mapping[str, str]) -> str:
    """The checkpoint that an instance serves. Raises ConfigError when none is given for its platform."""
    platform = instance.plan.platform
    path = model_path if isinstance(model_path, str) else model_path.get(platform, "")
    if not path:
        raise ConfigError(f"no checkpoint is given for {platform}: write {platform}=PATH")
    return argument("model path", path)


def argument(what: str, text: str) -> str:
    """A text that can stand as an argument. Raises ConfigError for an empty one, an option, or one with a NUL."""
    if not text or text.startswith("-") or "\0" in text:
        raise ConfigError(f"{what} {text!r:.80}: an engine would not take it as a {what}")
    return text


def api_port(instance: Instance, site: Site) -> int:
    """The API's port: the first instance of a node has the site's, the others follow."""
    return site.port + instance.slot


def _command(instance: Instance, part: NodePart, model_path: str, name: str, site: Site) -> EngineCommand:
    head = part is instance.parts[0]
    port = api_port(instance, site)
    serve = ("vllm", "serve", model_path, *serve_flags(instance, site, name, port), *node_flags(instance, part, site))
    argv: tuple[str, ...] = (*serve, *site.arguments)
    setup: tuple[tuple[str, ...], ...] = ()
    if instance.shape == "ray":
        join, start = _ray(instance, part, site)
        argv, setup = (argv, (start,)) if head else (join, setup)
    return EngineCommand(
        argv=argv,
        env=environment(instance, part, site),
        node=part.node,
        port=port,
        role="head" if head else "worker",
        health_path=HEALTH_PATH,
        address=site.address(part.node),
        head_address=site.address(instance.head),
        instance=instance.number,
        deployment=instance.deployment,
        replica=instance.replica,
        devices=part.devices,
        setup=setup,
    )


def _ray(instance: Instance, part: NodePart, site: Site) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(what a worker runs until it is stopped, what the head runs before it serves)."""
    port = site.ray_port + instance.slot
    devices = {"cuda": ("--num-gpus", str(len(part.devices)))}.get(
        instance.plan.platform, ("--resources", f'{{"NPU": {len(part.devices)}}}')
    )
    own = ("--node-ip-address", site.address(part.node), *devices)
    join = ("ray", "start", "--address", f"{site.address(instance.head)}:{port}", *own, "--block")
    return join, ("ray", "start", "--head", "--port", str(port), *own)


def _check_nodes(plan: Plan, site: Site) -> None:
    """Raises ConfigError when the plan runs on nodes that the cluster does not have."""
    used = list(dict.fromkeys(rank.node for rank in plan.ranks))
    strange = [node for node in used if node not in site.nodes]
    if site.nodes and strange:
        raise ConfigError(
            f"the plan runs on {len(used)} nodes, of which the cluster does not have {', '.join(strange[:3])}; it has "
            f"{len(site.nodes)}: {', '.join(site.nodes[:6])}; plan again for this cluster"
        )


def _check_version(plan: Plan, wanted: str | None) -> None:
    if wanted is None:
        return
    name, _, version = wanted.partition("==") if "==" in wanted else ("", "", wanted)
    short = ".".join(version.split(".")[:2])
    if name:
        check_engine_name(wanted)
    for deployment in plan.deployments:
        planned_name, _, planned = deployment.engine.partition("==")
        if (name and name != planned_name) or short != planned:
            raise ConfigError(
                f"engine {wanted}: the plan was made for {deployment.engine}; plan again with --engine "
                f"{wanted}, or use {deployment.engine}"
            )
