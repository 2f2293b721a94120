"""What every renderer works from: the plan, its instances and commands, where the checkpoints are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from transload.launch.checkpoint import Fingerprint
from transload.launch.command import EngineCommand
from transload.launch.commands import commands, path_for
from transload.launch.site import Form, Site
from transload.launch.topology import Instance, NodePart, instances
from transload.plan.result import Plan


@dataclass(frozen=True, slots=True)
class Setting:
    """A plan made concrete. commands and instances follow the plan; prints: fingerprints of checkpoints by path."""

    plan: Plan
    site: Site
    name: str
    model_path: str | Mapping[str, str]
    instances: tuple[Instance, ...]
    commands: tuple[EngineCommand, ...]
    prints: Mapping[str, Fingerprint]

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node that runs something, in the plan's order."""
        return tuple(dict.fromkeys(c.node for c in self.commands))

    def on(self, node: str) -> tuple[tuple[Instance, NodePart, EngineCommand], ...]:
        """What one node runs."""
        return tuple(row for row in self.rows() if row[2].node == node)

    def rows(self) -> tuple[tuple[Instance, NodePart, EngineCommand], ...]:
        """Every process with the part of the instance that it is."""
        parts = [(instance, part) for instance in self.instances for part in instance.parts]
        return tuple((i, p, c) for (i, p), c in zip(parts, self.commands, strict=True))

    def path(self, instance: Instance) -> str:
        """The checkpoint of an instance."""
        return path_for(instance, self.model_path)

    def in_form(self, form: Form) -> Setting:
        """The same plan started in another form. Raises ConfigError when it cannot be."""
        return setting(self.plan, self.model_path, None, replace(self.site, form=form), self.prints)


def setting(
    plan: Plan,
    model_path: str | Mapping[str, str],
    engine_version: str | None = None,
    site: Site | None = None,
    prints: Mapping[str, Fingerprint] | None = None,
) -> Setting:
    """The Setting of a plan; for arguments and errors see `commands`."""
    site = site or Site()
    return Setting(
        plan=plan,
        site=site,
        name=site.served_name or plan.model,
        model_path=model_path,
        instances=instances(plan, site.form),
        commands=commands(plan, model_path, engine_version, site),
        prints=prints or {},
    )
