"""Ray: ray/NODE.sh starts the Ray node, and on the head the engine, for instances over several nodes.

Every instance has a Ray cluster of its own, so that its workers land on the devices that the plan gives it.
"""

from __future__ import annotations

from transload.launch import shell
from transload.launch.setting import Setting

FORMAT = "ray"


def files(setting: Setting) -> dict[str, str]:
    """ray/NODE.sh for every node. Raises ConfigError when Ray cannot start the plan."""
    over_ray = setting.in_form("ray")
    return {f"ray/{node}.sh": shell.script(over_ray, node, usage="ray") for node in over_ray.nodes}


def objection(setting: Setting) -> str | None:
    """Why the plan has no use for Ray, or None."""
    if all(len(instance.parts) == 1 for instance in setting.instances):
        return "every engine runs on one node"
    return None
