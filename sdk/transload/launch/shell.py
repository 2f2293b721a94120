"""Shell scripts: shell/NODE.sh starts what one node runs, in vLLM's native or data-parallel multi-node form."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from transload.launch.command import EngineCommand
from transload.launch.environment import INTERFACES, NETWORK
from transload.launch.setting import Setting
from transload.launch.topology import Instance, NodePart
from transload.launch.words import commented, engine_words, header, memory_words, numbers

FORMAT = "shell"


def files(setting: Setting) -> dict[str, str]:
    """shell/NODE.sh for every node."""
    return {f"shell/{node}.sh": script(setting, node) for node in setting.nodes}


def script(setting: Setting, node: str, usage: str = "shell") -> str:
    """The script of one node. Without an argument it starts every engine process of the node, with one that process."""
    rows = setting.on(node)
    names = [command.name for _, _, command in rows]
    spans = any(len(instance.parts) > 1 for instance, _, _ in rows)
    parts = ["#!/usr/bin/env bash\n" + _comments(setting, node, usage), "set -euo pipefail\n"]
    if spans:
        parts.append(network(setting, node))
    parts += [_function(setting, *row) for row in rows]
    parts.append(_one(names[0]) if len(names) == 1 else _several(names))
    return "\n".join(parts).rstrip() + "\n"


def _comments(setting: Setting, node: str, usage: str) -> str:
    rows = setting.on(node)
    lines = [*header(setting.plan, f"Starts what node {node} runs."), ""]
    for instance, part, command in rows:
        lines.append(engine_words(instance))
        lines.append(f"  here: {command.role}, device {numbers(part.devices)}; {where(instance, command)}")
        lines.append(f"  {memory_words(instance)}")
    lines.append("")
    lines.append(f"Usage: {usage}/{node}.sh" + (" [ENGINE]" if len(rows) > 1 else ""))
    lines.append("VLLM names another vllm program than the one on PATH.")
    return commented(lines)


def where(instance: Instance, command: EngineCommand) -> str:
    """Where the instance's API answers, or which node a worker waits for."""
    url = f"{command.health_url.removesuffix(command.health_path)}/v1"
    return f"serves {url}" if command.role == "head" else f"joins {instance.head}, which serves {url}"


def network(setting: Setting, node: str) -> str:
    """Lines that set HOST_IP and INTERFACE, from the cluster file or from what the node says of itself."""
    site, ip = setting.site, setting.site.host_ip(node)
    interface = site.interfaces.get(node)
    text = commented(["This node's address, and the interface that has it; the environment may say otherwise."])
    if ip is not None:
        text += f"HOST_IP=${{HOST_IP:-{ip}}}\n"
    else:
        text += (
            f"HOST_IP=${{HOST_IP:-$(getent ahosts {shlex.quote(site.address(node))} | awk 'NR == 1 {{print $1}}')}}\n"
        )
    if interface is not None:
        text += f"INTERFACE=${{INTERFACE:-{interface}}}\n"
    else:
        text += (
            'if [ -z "${INTERFACE:-}" ]; then\n'
            '  INTERFACE=$(ip -o address show | awk -v ip="$HOST_IP" '
            "'{split($4, a, \"/\")} a[1] == ip {print $2; exit}')\n"
            "fi\n"
        )
    message = "no interface of this machine has the address '$HOST_IP'; set HOST_IP or INTERFACE"
    return text + f'[ -n "$INTERFACE" ] || {{ echo "{message}" >&2; exit 1; }}\n'


def _function(setting: Setting, instance: Instance, part: NodePart, command: EngineCommand) -> str:
    body = exports(command, instance)
    body += [_step(step, instance) for step in command.setup]
    body.append("  exec " + joined(own_address(command.argv, command.role == "head", instance), "    ").lstrip())
    return f"{function(command.name)}() {{\n" + "\n".join(body) + "\n}\n"


def _step(step: Sequence[str], instance: Instance) -> str:
    """A command that comes first. A Ray head that runs already, from an earlier start of this script, is kept."""
    words = joined(own_address(step, True, instance), "    ").lstrip()
    return f'  ray status --address "$RAY_ADDRESS" >/dev/null 2>&1 || {words}' if step[0] == "ray" else f"  {words}"


def function(name: str) -> str:
    """A bash function's name for a process: engine_0, engine_0_worker."""
    return "_".join(name.split("-")[:3] if "-worker-" in name else name.split("-"))


def exports(command: EngineCommand, instance: Instance, indent: str = "  ") -> list[str]:
    """export lines; the network's variables take the script's own HOST_IP and INTERFACE."""
    env = {k: v for k, v in command.env.items() if k not in NETWORK}
    lines = [f"{indent}export {name}={shlex.quote(value)}" for name, value in env.items()]
    if len(instance.parts) > 1:
        platform = instance.plan.platform
        addresses = ("VLLM_HOST_IP", "HCCL_IF_IP") if platform == "ascend" else ("VLLM_HOST_IP",)
        lines = [f'{indent}export {name}="$HOST_IP"' for name in addresses] + [
            *(f'{indent}export {name}="$INTERFACE"' for name in INTERFACES[platform]),
            *lines,
        ]
    return lines


def own_address(argv: Sequence[str], head: bool, instance: Instance) -> list[str]:
    """A command as shell words; what a node binds to is its HOST_IP, since engines do not bind to host names."""
    words = [shlex.quote(w) for w in argv]
    if words[0] == "vllm":
        words[0] = '"${VLLM:-vllm}"'
    bound = ("--node-ip-address", *(("--master-addr", "--data-parallel-address") if head else ()))
    for option in bound if len(instance.parts) > 1 else ():
        if option in argv:
            words[argv.index(option) + 1] = '"$HOST_IP"'
    return words


def joined(words: Sequence[str], indent: str) -> str:
    """Shell words, an option a line."""
    lines = [f"{indent}{words[0]}"]
    for word in words[1:]:
        if word.startswith("--"):
            lines.append(f"{indent}{word}")
        else:
            lines[-1] += f" {word}"
    return " \\\n".join(lines)


def _one(name: str) -> str:
    return f"{function(name)}\n"


def _several(names: Sequence[str]) -> str:
    """The end of a script with several processes: one of them, or all as children that are stopped together."""
    cases = "".join(f"  {shlex.quote(n)}) {function(n)} ;;\n" for n in names)
    starts = "".join(f"{function(n)} &\npids+=($!)\n" for n in names)
    unknown = 'echo "$0: no process $1 on this node; there are: ' + " ".join(names) + '" >&2; exit 2'
    return (
        "case ${1:-} in\n  '') ;;\n" + cases + f"  *) {unknown} ;;\nesac\n\n"
        "# All of them: a signal is passed on, and the script ends when the last one has.\n"
        "pids=()\n"
        'stop() { kill -TERM "${pids[@]}" 2>/dev/null || true; }\n'
        "trap stop TERM INT\n" + starts + "status=0\n"
        'for pid in "${pids[@]}"; do\n'
        '  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || status=$?; done\n'
        "done\n"
        'exit "$status"\n'
    )
