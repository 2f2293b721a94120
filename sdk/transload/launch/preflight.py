"""preflight.sh: what must be true on a node before an engine starts there, checked with the node's own tools."""

from __future__ import annotations

import shlex
from importlib.resources import files as files_of

from transload.launch.checkpoint import EDGE
from transload.launch.setting import Setting
from transload.launch.topology import Instance, NodePart
from transload.launch.words import commented, header, one_line

FILE = "preflight.sh"


def lists(setting: Setting) -> dict[str, str]:
    """checkpoint-PLATFORM.sha256 for every checkpoint that was read: size, quick and full hash, name of every file."""
    out = {}
    for platform, path in _paths(setting).items():
        if path not in setting.prints:
            continue
        found = setting.prints[path]
        head = header(
            setting.plan, f"Files of {one_line(path)}: bytes, SHA-256 of the first and last MiB, of all of it, name."
        )
        rows = [f"{f.size} {f.quick} {f.full or '-'} {f.name}\n" for f in found.files]
        out[list_file(platform)] = commented(head) + "".join(rows)
    return out


def list_file(platform: str) -> str:
    """The name of a platform's list of checkpoint files."""
    return f"checkpoint-{platform}.sha256"


def _paths(setting: Setting) -> dict[str, str]:
    return {i.plan.platform: setting.path(i) for i in setting.instances}


def files(setting: Setting) -> dict[str, str]:
    """preflight.sh and the lists of checkpoint files that it reads."""
    return {FILE: script(setting), **lists(setting)}


def script(setting: Setting) -> str:
    """One script for all nodes; the node's name is its argument, or found by the host name."""
    about = "Checks a node before an engine starts there: ./preflight.sh [--full] [NODE]"
    notes = [
        "--full also compares the SHA-256 of whole files, where the plan was rendered with them.",
        "Exit status 0 when nothing failed. Run it on every node; containers check their engine's version themselves.",
    ]
    return "".join(
        [
            "#!/usr/bin/env bash\n",
            commented([*header(setting.plan, about), *notes]),
            _functions(),
            _choice(setting),
            "\ncase $node in\n",
            *(_case(setting, node) for node in setting.nodes),
            _END,
        ]
    )


def _functions() -> str:
    """The checks, each a function in bash."""
    text = (files_of("transload.launch") / "data" / "preflight.bash").read_text(encoding="utf-8")
    return text.replace("@EDGE@", str(EDGE))


def _choice(setting: Setting) -> str:
    known = " ".join(setting.nodes)
    return (
        "\nfull=0\n"
        'if [ "${1:-}" = --full ]; then full=1; shift; fi\n'
        f"nodes=({known})\n"
        "node=${1:-$(hostname -s)}\n" + ("" if len(setting.nodes) > 1 else f"[ $# -gt 0 ] || node={setting.nodes[0]}\n")
    )


def _case(setting: Setting, node: str) -> str:
    rows = setting.on(node)
    lines: list[str] = []
    peers = [n for n in dict.fromkeys(p.node for i, _, _ in rows for p in i.parts) if n != node]
    if peers:
        site = setting.site
        lines.append(f"address {shlex.quote(site.address(node))} {shlex.quote(site.interfaces.get(node, ''))}")
        lines += [f"reach {shlex.quote(peer)} {shlex.quote(site.address(peer))}" for peer in peers]
    lines += list(dict.fromkeys(line for i, p, _ in rows for line in _devices(i, p)))
    lines += [f"port {command.port}" for _, _, command in rows if command.role == "head"]
    lines += [f"port {p}" for i, _, c in rows if c.role == "head" for p in _listens(setting, i)]
    lines += list(dict.fromkeys(_engine(i, setting) for i, _, _ in rows))
    lines += list(dict.fromkeys(_model(i, setting) for i, _, _ in rows))
    return f"  {node})\n" + "".join(f"    {line}\n" for line in lines) + "    ;;\n"


def _listens(setting: Setting, instance: Instance) -> list[int]:
    """Ports beside the API's that the head listens on for the other nodes."""
    return [number for number, _ in head_ports(setting, instance)]


def head_ports(setting: Setting, instance: Instance) -> list[tuple[int, str]]:
    """(port, what for) of a head's ports that other nodes must reach."""
    site, n = setting.site, instance.slot
    ports = {
        "native": [(site.master_port + n, "torch rendezvous")],
        "dp": [(site.rpc_port + n, "data-parallel RPC")],
        "ray": [(site.ray_port + n, "Ray")],
        "one node": [],
    }[instance.shape]
    if instance.shape == "native" and instance.parallelism.dp > 1:
        ports.append((site.rpc_port + n, "data-parallel RPC"))
    return ports


def _devices(instance: Instance, part: NodePart) -> list[str]:
    """Free memory: what the engine asks of every device, of RAM on a CPU."""
    budget = max(stage.budget for stage in instance.plan.stages)
    mib = -(-budget // (1 << 20))
    ids = " ".join(str(d) for d in part.devices)
    if instance.plan.platform == "cuda":
        return [f"cuda_free {mib} {ids}"]
    if instance.plan.platform == "ascend":
        lines = [f"ascend_free {mib} {ids}"]
        return [*lines, f"ascend_links {ids}"] if len(part.devices) > 1 else lines
    needed = sum(line.size for stage in instance.plan.stages for line in stage.lines) * len(part.devices)
    return [f"ram_free {-(-needed // len(instance.plan.stages) // (1 << 20))}"]


def _engine(instance: Instance, setting: Setting) -> str:
    name, _, version = instance.plan.engine.partition("==")
    return f"engine {shlex.quote(name)} {shlex.quote(version)}"


def _model(instance: Instance, setting: Setting) -> str:
    path = setting.path(instance)
    listed = list_file(instance.plan.platform) if path in setting.prints else ""
    return f"checkpoint {shlex.quote(path)} {shlex.quote(listed)}"


_END = r"""  *)
    echo "preflight.sh: no node '$node'; name one of: ${nodes[*]}" >&2
    exit 2
    ;;
esac

if [ "$failed" -gt 0 ]; then
  echo "$node: $failed of the checks failed"
  exit 1
fi
echo "$node: ready"
"""
