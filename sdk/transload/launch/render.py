"""render(plan, ...): every file of a rendered folder, as text, the same for the same plan."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from transload import __version__
from transload.errors import ConfigError
from transload.launch import compose, kubernetes, preflight, ray, readme, router, shell, systemd
from transload.launch.checkpoint import Fingerprint
from transload.launch.manifest import FILE as MANIFEST
from transload.launch.manifest import PLAN_FILE, Manifest, ModelFiles, Process, digest
from transload.launch.setting import Setting, setting
from transload.launch.site import Site
from transload.plan.result import Plan

FORMATS: Mapping[str, Callable[[Setting], dict[str, str]]] = {
    shell.FORMAT: shell.files,
    systemd.FORMAT: systemd.files,
    ray.FORMAT: ray.files,
    compose.FORMAT: compose.files,
    kubernetes.FORMAT: kubernetes.files,
}


@dataclass(frozen=True, slots=True)
class Rendered:
    """Files by name, the manifest among them, and the formats that were left out, with the reason."""

    files: Mapping[str, str]
    manifest: Manifest
    left_out: Mapping[str, str]


def render(
    plan: Plan,
    model_path: str | Mapping[str, str],
    engine_version: str | None = None,
    site: Site | None = None,
    formats: Sequence[str] | None = None,
    prints: Mapping[str, Fingerprint] | None = None,
) -> Rendered:
    """Every file for a plan.

    formats: names from FORMATS; None takes all that can start the plan, and says why the others cannot. prints:
    fingerprints of the checkpoints by path, for preflight.sh and `transload launch`. For the other arguments see
    `commands`. Raises ConfigError for an unknown format, or one that was asked for and cannot start the plan.
    """
    made = setting(plan, model_path, engine_version, site, prints)
    chosen = _chosen(formats)
    files: dict[str, str] = {}
    left_out: dict[str, str] = {}
    for name in chosen:
        try:
            reason = ray.objection(made) if name == ray.FORMAT else None
            if reason is None:
                files |= FORMATS[name](made)
                continue
        except ConfigError as error:
            reason = str(error)
        if formats is not None:
            raise ConfigError(f"format '{name}' cannot start this plan: {reason}")
        left_out[name] = reason
    files |= preflight.files(made) | router.files(made)
    files["README.md"] = readme.text(made, [f for f in chosen if f not in left_out], left_out)
    files[PLAN_FILE] = plan.to_json() + "\n"
    manifest = _manifest(made, [f for f in chosen if f not in left_out], files)
    return Rendered(dict(sorted(files.items())) | {MANIFEST: manifest.to_json()}, manifest, left_out)


def _chosen(formats: Sequence[str] | None) -> list[str]:
    """The formats in the order of FORMATS; systemd units start the shell scripts, so those come with them."""
    if formats is None:
        return list(FORMATS)
    for name in formats:
        if name not in FORMATS:
            near = difflib.get_close_matches(name, FORMATS, 1) or list(FORMATS)
            raise ConfigError(f"format '{name[:40]}' is not known; there are {', '.join(FORMATS)}; nearest: {near[0]}")
    if not formats:
        raise ConfigError(f"no format was named; there are {', '.join(FORMATS)}")
    wanted = {*formats, shell.FORMAT} if systemd.FORMAT in formats else set(formats)
    return [name for name in FORMATS if name in wanted]


def _manifest(made: Setting, formats: Sequence[str], files: Mapping[str, str]) -> Manifest:
    paths = {i.plan.platform: made.path(i) for i in made.instances}
    return Manifest(
        transload=__version__,
        plan_digest=digest(files[PLAN_FILE]),
        name=made.name,
        models=tuple(
            ModelFiles(platform=platform, path=path, digest=made.prints[path].digest if path in made.prints else None)
            for platform, path in paths.items()
        ),
        engines=tuple(dict.fromkeys(d.engine for d in made.plan.deployments)),
        formats=tuple(formats),
        nodes=made.nodes,
        processes=tuple(Process.of(command) for command in made.commands),
        files={name: digest(text) for name, text in sorted(files.items())},
    )
