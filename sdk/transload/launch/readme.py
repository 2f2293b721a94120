"""README.md of a rendered folder: what runs where, how to start it, which ports are open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transload.launch import router
from transload.launch.preflight import head_ports
from transload.launch.setting import Setting
from transload.launch.topology import Instance
from transload.launch.words import numbers, one_line, shape_words, title

_STARTS = {
    "shell": "On every node: `shell/NODE.sh`, the first node of an engine and the others in any order.",
    "systemd": "On every node, with this folder in `{directory}`: `systemctl link {directory}/systemd/NODE/*.service`, "
    "then `systemctl enable --now` them. A unit counts as started when its engine is healthy.",
    "ray": "On every node: `ray/NODE.sh`; Ray must be installed beside the engine.",
    "compose": "On every node: `docker compose -f compose/NODE.yaml up -d`.",
    "kubernetes": "`kubectl apply -f kubernetes/`; several nodes for an engine need the LeaderWorkerSet controller. "
    "Kubernetes chooses the nodes.",
}


def text(setting: Setting, formats: Sequence[str], left_out: Mapping[str, str]) -> str:
    """The page."""
    plan = setting.plan
    lines = [
        f"# {title(plan)}",
        "",
        "Rendered by transload from `plan.json`. To change something, plan again, render again and look "
        "at the difference; `launch.json` tells which files belong to the rendering.",
        "",
        f"Planned: {plan.context} tokens of context, {plan.kv_tokens} KV tokens, {plan.max_concurrency:g} sequences of "
        f"full context at once. Clients call the model `{one_line(setting.name)}`.",
        "",
        "| engine | nodes and devices | shape | API | other ports of its first node |",
        "| --- | --- | --- | --- | --- |",
        *(_row(setting, instance) for instance in setting.instances),
        "",
        *_router(setting),
        "## Before the first start",
        "",
        "`./preflight.sh NODE` on every node checks addresses, ports, free memory, the engine's release and the "
        "checkpoint; `--full` compares whole files. `transload plan check .` checks this folder with the engine's own "
        "parser.",
        "",
        "## Start",
        "",
    ]
    lines += [f"- **{name}**: {_STARTS[name].format(directory=setting.site.directory)}" for name in formats]
    lines += [
        "",
        "An engine is up when `GET /health` at its API answers 200. It serves whoever reaches the port unless "
        "`VLLM_API_KEY` is set: in the environment, `/etc/default/transload`, `.env`, or the secret that the files for "
        "Kubernetes name.",
        *_ports(setting),
    ]
    if left_out:
        lines += ["", "Not rendered:", "", *(f"- {name}: {one_line(why, 400)}" for name, why in left_out.items())]
    warnings = [f"- {one_line(w, 400)}" for w in plan.warnings]
    return "\n".join([*lines, *(["", "The plan's warnings:", "", *warnings] if warnings else [])]) + "\n"


def _row(setting: Setting, instance: Instance) -> str:
    places = "; ".join(f"{part.node}: {numbers(part.devices)}" for part in instance.parts)
    url = f"http://{setting.site.address(instance.head)}:{setting.site.port + instance.slot}/v1"
    ports = ", ".join(f"{port} ({why})" for port, why in head_ports(setting, instance)) or "none"
    d = instance.plan
    return f"| engine-{instance.number}, {d.engine} | {places} | {shape_words(instance)} | {url} | {ports} |"


def _router(setting: Setting) -> list[str]:
    if len(setting.instances) < 2:
        return []
    return [
        f"`{router.FILE}` makes one address of them, port {router.PORT}, weighted by the plan's shares of the traffic.",
        "",
    ]


def _ports(setting: Setting) -> list[str]:
    if all(len(instance.parts) == 1 for instance in setting.instances):
        return []
    return [
        "",
        "Between the nodes of an engine no firewall may stand: beside the ports above, collectives and data-parallel "
        "messages use ports that the system chooses (`net.ipv4.ip_local_port_range`).",
    ]
