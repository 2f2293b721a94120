"""From a plan to running engines: command lines, files that a team keeps in git, and checks by the engines' own code.

    from transload.launch import Site, commands, read_manifest
    for c in commands(plan, "/models/glm", site=Site(addresses={"a3-0": "10.0.0.1"})):
        print(c.node, c.role, c.env, c.argv)
    read_manifest("launch/").on_node(0)     # the same values, from a folder that `transload plan render` wrote

Nothing here imports torch or starts an engine.
"""

from transload.launch.command import EngineCommand
from transload.launch.commands import commands
from transload.launch.manifest import Manifest, plan_from, read_manifest, read_plan
from transload.launch.site import Site

__all__ = ["EngineCommand", "Manifest", "Site", "commands", "plan_from", "read_manifest", "read_plan"]
