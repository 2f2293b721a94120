"""`transload plan render` and `transload plan check`: files to start a plan with, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transload.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transload.launch.check import Finding
    from transload.launch.checkpoint import Fingerprint
    from transload.launch.render import Rendered
    from transload.launch.site import Form, Site
    from transload.launch.write import Written
    from transload.plan.result import Plan


def render_command(
    plan: Annotated[Path, typer.Argument(help="A plan, as `transload plan --save` wrote it.")],
    model: Annotated[
        list[str],
        typer.Option("--model", "-m", help="The checkpoint as the nodes see it: PATH, or cuda=PATH and ascend=PATH."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    formats: Annotated[
        str | None,
        typer.Option("--format", "-f", help="shell,systemd,ray,compose,kubernetes; all that can start the plan."),
    ] = None,
    cluster: Annotated[
        Path | None, typer.Option("--cluster", "-c", help="The cluster file, for addresses and interfaces.")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="The engine's release, to be sure: vllm==0.32.")] = None,
    name: Annotated[
        str | None,
        typer.Option("--name", "--served-model-name", help="What clients call the model; the plan's name for it."),
    ] = None,
    port: Annotated[int, typer.Option(help="The API's port of the first engine.")] = 8000,
    form: Annotated[str, typer.Option(help="Over several nodes: auto, native, dp or ray.")] = "auto",
    arguments: Annotated[
        str, typer.Option("--arguments", help="More arguments for every engine, as one shell text.")
    ] = "",
    env: Annotated[
        list[str] | None, typer.Option("--env", help="More variables, NAME=VALUE; may be given several times.")
    ] = None,
    additional_config: Annotated[str | None, typer.Option(help="vllm-ascend's --additional-config, as JSON.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="Another container image: cuda=IMAGE.")] = None,
    directory: Annotated[str, typer.Option(help="Where the folder will lie on the nodes.")] = "/opt/transload",
    hashes: Annotated[
        str, typer.Option("--hash", help="Of the checkpoint, where it is here: edges (fast), full or none.")
    ] = "edges",
    force: Annotated[bool, typer.Option("--force", help="Replace files that differ.")] = False,
) -> None:
    """Writes what starts a plan: scripts, units, compose and Kubernetes files, a router, a check of nodes."""
    from dataclasses import replace

    from transload.launch.manifest import plan_from
    from transload.launch.render import render
    from transload.launch.site import additional
    from transload.launch.write import write

    read = plan_from(plan)
    paths = _by_platform("--model", model)
    site = replace(
        _site(cluster),
        served_name=name,
        port=port,
        form=_form(form),
        arguments=_words(arguments),
        env=dict(_variable(text) for text in env or []),
        additional_config=additional(additional_config) if additional_config else {},
        msmodelslim=_msmodelslim(paths.get("ascend", paths.get("", ""))),
        images=_by_platform("--image", image or []),
        directory=directory,
    )
    chosen = None if formats is None else [f.strip() for f in formats.split(",") if f.strip()]
    rendered = render(read, paths.get("", paths), engine, site, chosen, _prints(paths, hashes))
    _show_written(out, read, rendered, write(rendered.files, out, force))


def check_command(
    folder: Annotated[Path, typer.Argument(help="A folder that `transload plan render` wrote.")],
    config: Annotated[
        Path | None, typer.Option(help="Where the model's config.json is, if not at the planned path.")
    ] = None,
    python: Annotated[
        str | None, typer.Option(help="The python of a vLLM; without it $TRANSLOAD_VLLM_PYTHON, or vllm on PATH.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Judges a rendered folder by the engine's own parser and the tools that will read its files. Exit code 2: bad."""
    from transload.launch.check import check, passed

    findings = check(folder, config, python)
    if as_json:
        import json
        from dataclasses import asdict

        print(json.dumps([asdict(f) for f in findings], indent=2))
    else:
        _show_findings(findings)
    if not passed(findings):
        raise typer.Exit(2)


def add_to(app: typer.Typer) -> None:
    """Adds both to the group of `transload plan`."""
    app.command("render", no_args_is_help=True)(render_command)
    app.command("check", no_args_is_help=True)(check_command)


def _by_platform(option: str, values: Sequence[str]) -> dict[str, str]:
    """{"": PATH}, or {"cuda": PATH, ...}. Raises ConfigError for a mixture, or one platform twice."""
    from transload.launch.environment import INTERFACES

    out: dict[str, str] = {}
    for value in values:
        head, equals, path = value.partition("=")
        platform, path = (head, path) if equals and head in INTERFACES else ("", value)
        if platform in out or (out and ("" in out or not platform)):
            raise ConfigError(f"{option} {value:.80}: give one for all, or one for each of {', '.join(INTERFACES)}")
        out[platform] = path
    return out


def _site(cluster: Path | None) -> Site:
    from transload.launch.site import Site
    from transload.plan.cluster import load_cluster

    return Site() if cluster is None else Site.of(load_cluster(cluster))


def _form(text: str) -> Form:
    from transload.launch.site import FORMS

    for form in FORMS:
        if form == text:
            return form
    raise ConfigError(f"form '{text[:40]}': expected one of {', '.join(FORMS)}")


def _words(text: str) -> tuple[str, ...]:
    import shlex

    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(f"--arguments: {error}") from error


def _msmodelslim(path: str) -> bool | None:
    """Whether a checkpoint that is here is msModelSlim's; None when it is not here."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return None
    return any(folder.glob("quant_model_description*.json"))


def _variable(text: str) -> tuple[str, str]:
    import re

    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise ConfigError(f"--env {text:.60}: expected NAME=VALUE")
    return name, value


def _prints(paths: Mapping[str, str], hashes: str) -> dict[str, Fingerprint]:
    """Fingerprints of the checkpoints that are on this machine."""
    from transload.launch.checkpoint import fingerprint

    if hashes not in ("edges", "full", "none"):
        raise ConfigError(f"--hash {hashes}: expected edges, full or none")
    if hashes == "none":
        return {}
    return {path: fingerprint(path, hashes == "full") for path in paths.values() if Path(path).exists()}


def _doubts(plan: Plan, rendered: Rendered) -> list[str]:
    """What the frozen flag tables say of the commands, each sentence once; `check` asks the engine itself."""
    from transload.launch.check import by_table

    commands = rendered.manifest.commands()
    return list(dict.fromkeys(f.text for f in by_table(commands, plan) if f.state == "bad"))


def _show_written(out: Path, plan: Plan, rendered: Rendered, written: Written) -> None:
    manifest = rendered.manifest
    engines = len({p.instance for p in manifest.processes})
    print(
        f"{out}: {engines} engine{'s' * (engines > 1)} on {len(manifest.nodes)} node{'s' * (len(manifest.nodes) > 1)}"
    )
    for name in (*written.created, *written.changed):
        print(f"  {'wrote' if name in written.created else 'replaced'} {name}")
    if written.unchanged:
        print(f"  {len(written.unchanged)} files unchanged")
    for name, reason in rendered.left_out.items():
        print(f"  no {name}: {reason}")
    if any(model.digest is None for model in manifest.models):
        print("  the checkpoint is not here, so preflight.sh only tells its hash; nodes must agree")
    for problem in _doubts(plan, rendered):
        print(f"  careful: {problem}")
    if written.stale:
        print(f"  from an older rendering, no longer used: {', '.join(written.stale)}")
    print(f"next: transload plan check {out}")


def _show_findings(findings: Sequence[Finding]) -> None:
    from collections import Counter

    from rich.console import Console

    good = Counter(f.by for f in findings if f.state == "ok")
    bad = sum(f.state == "bad" for f in findings)
    console = Console(soft_wrap=True)
    for by, count in good.items():
        console.print(f"[green]ok[/]    {count:4} x {by}", highlight=False)
    for state, word in (("note", "[yellow]note[/]"), ("bad", "[bold red]bad[/] ")):
        for finding in findings:
            if finding.state == state:
                console.print(f"{word}  ", end="")
                console.print(f"{finding.subject} ({finding.by}): {finding.text}", markup=False, highlight=False)
    console.print(f"[bold red]{bad} bad[/]" if bad else "[bold green]good[/]")
