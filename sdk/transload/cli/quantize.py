"""`transload quantize` and `transload recipes`: a float model to 4 or 8 bits, by a recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transload.cli import app
from transload.cli.show import print_json, short_role, size, table
from transload.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from transload.quantize.layerwise import Made
    from transload.quantize.report import QuantizeReport


@app.command()
def quantize(
    model: Annotated[Path, typer.Argument(help="A float model folder, or any checkpoint: GGUF and FP8 are read too.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it appears only when it is complete.")],
    recipe: Annotated[
        str,
        typer.Option(
            help="A name from `transload recipes`, a .yaml file, or a recipe.yaml of llm-compressor or "
            "quantize_config.json of GPTQModel."
        ),
    ] = "int4-g128",
    to: Annotated[
        str, typer.Option("--to", help="A format (compressed-tensors, gptq, transload) or an engine (vllm-ascend).")
    ] = "compressed-tensors",
    calibration: Annotated[
        Path | None, typer.Option(help="Text: .txt, or .jsonl with text or messages. Default: a small built-in sample.")
    ] = None,
    floats: Annotated[str, typer.Option(help="fp32, bf16 or fp16 for embeddings that the source quantizes.")] = "bf16",
    device: Annotated[str, typer.Option(help="Where layers are calibrated: cpu, cuda, cuda:1.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was killed.")] = False,
    modules: Annotated[bool, typer.Option("--modules", help="One row for every module.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Quantizes a model layer by layer with calibration text, and writes it for a format or an engine."""
    from transload.quantize.run import quantize as run

    with _layers(quiet=json) as update:
        report = run(
            model,
            out,
            recipe,
            to=to,
            calibration=calibration,
            floats=floats,
            device=device,
            overwrite=overwrite,
            resume=resume,
            progress=update,
        )
    if json:
        print_json(report.to_json())
        return
    from rich.console import Console

    _print_report(Console(), report, modules)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Shows one of them as the YAML file that it is.")] = None,
    foreign: Annotated[
        Path | None,
        typer.Option(
            "--import",
            help="Prints the recipe that says the same as a recipe.yaml of llm-compressor or a quantize_config.json of "
            "GPTQModel.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the recipes as JSON.")] = False,
) -> None:
    """Lists the recipes that come with Transload and what they do, shows one, or translates another tool's."""
    from transload.quantize.imported import find_recipe, imported
    from transload.quantize.recipe import shipped

    if name is not None and foreign is not None:
        raise ConfigError("give a recipe's name or --import FILE, not both")
    if name is not None or foreign is not None:
        found = imported(foreign) if foreign is not None else find_recipe(name or "")
        if json:
            print_json({**found.recipe.model_dump(mode="json"), "notes": list(found.notes)})
        else:
            typer.echo(found.to_yaml(), nl=False)
        return
    known = shipped()
    if json:
        print_json({name: r.model_dump(mode="json") for name, r in known.items()})
        return
    from rich.console import Console

    rows = []
    for r in known.values():
        methods = ", ".join(dict.fromkeys(rule.method for rule in r.rules if rule.spec is not None))
        extra = [f"smooth {r.smooth:g}"] if r.smooth is not None else []
        extra += ["rotate"] if r.rotate else []
        rows.append((r.name, r.schemes(), " + ".join([methods, *extra]), r.summary))
    console = Console()
    console.print(table(("recipe", "schemes", "method", "what it is for"), rows))
    console.print("`transload recipes NAME` shows one as a file to start your own from; methods: docs/quantize.md")


@contextmanager
def _layers(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar over decoder layers."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("[bold]quantizing"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task("", total=None, what="reading")
        yield lambda done, total, what: progress.update(task, completed=done, total=total, what=what)


def _print_report(console: Console, report: QuantizeReport, every: bool) -> None:
    from rich.markup import escape

    groups: dict[tuple[str, str, str], list[Made]] = {}
    for m in report.modules:
        groups.setdefault((m.name if every else short_role(m.name), _short_scheme(m.scheme), m.method), []).append(m)
    rows = []
    for (role, scheme, method), made in groups.items():
        outputs = [m.output_sqnr for m in made if m.output_sqnr is not None]
        tokens = sorted(m.tokens for m in made)
        seen = str(tokens[0]) if tokens[0] == tokens[-1] else f"{tokens[0]} to {tokens[-1]}"
        worst = f"{min(outputs):.1f} dB" if outputs else ""
        rows.append((role, scheme, method, seen, f"{min(m.weight_sqnr for m in made):.1f} dB", worst, str(len(made))))
    columns = ("module", "scheme", "method", ">tokens", ">weight", ">output", ">count")
    shown = table(columns, rows)
    shown.columns[0].no_wrap = True
    console.print(shown)
    port = report.port
    console.print(
        f"[bold]{escape(port.target)}[/]: {size(port.bytes_after)} in {report.seconds:.0f} s, calibrated with "
        f"{escape(report.text)}; weight and output are the worst signal-to-noise of their row"
    )
    for m in report.fallbacks if every else report.fallbacks[:8]:
        console.print(f"[yellow]note[/] {escape(m.name)}: {escape(m.note)}")
    if not every and len(report.fallbacks) > 8:
        console.print(f"[yellow]note[/] {len(report.fallbacks) - 8} more modules have notes: --modules shows all")
    for note in (*(report.notes if every else [n for n in report.notes if " -> " not in n]), *port.notes):
        console.print(f"[yellow]note[/] {escape(note)}")
    console.print()
    answers = [(a.engine, "[red]no[/]" if a.command is None else "[green]yes[/]", escape(a.command or a.reason or ""))
               for a in port.engines]  # fmt: skip
    console.print(table(("engine", "", "command, or why not"), answers))


def _short_scheme(scheme: str) -> str:
    """A scheme for a narrow column: int8 channel sym fp16, a8 static."""
    for long, short in ((" + int8 dynamic per token", ", a8"), (" + int8 static per tensor", ", a8 static")):
        scheme = scheme.replace(long, short)
    return scheme
