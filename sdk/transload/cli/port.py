"""`transload port` and `transload verify`: move a checkpoint to another format, and prove that nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transload.cli import app
from transload.cli.show import byte_progress, print_json, size, table

if TYPE_CHECKING:
    from transload.porting import PortReport


@app.command()
def port(
    source: Annotated[Path, typer.Argument(help="A GGUF or safetensors file, or a model folder.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it appears only when it is complete.")],
    to: Annotated[str, typer.Option("--to", help="The format to write, for example compressed-tensors.")],
    requantize: Annotated[
        str | None,
        typer.Option(help="Scheme for modules that the format cannot hold exactly, for example int4-g128. Lossy."),
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace the target if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Writes the same numbers in another format. Refuses what the format cannot hold unless --requantize is given."""
    from transload.porting import port as run_port

    with byte_progress("porting", quiet=json) as update:
        report = run_port(source, target, to=to, requantize=requantize, overwrite=overwrite, progress=update)
    if json:
        print_json(report.to_json())
    else:
        _print_report(report)


@app.command()
def verify(
    left: Annotated[Path, typer.Argument(help="A checkpoint.")],
    right: Annotated[Path, typer.Argument(help="Another checkpoint of the same model.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Re-opens two checkpoints and compares every module's numbers. Exit code 1 when they differ."""
    from transload.porting import verify as compare

    with byte_progress("comparing", quiet=json) as update:
        found = compare(left, right, progress=update)
    if json:
        print_json(found.to_json())
    else:
        print(found)
    if not found.equal:
        raise typer.Exit(1)


def _print_report(report: PortReport) -> None:
    from rich.console import Console

    Console().print(table(("module", "from", "to"), []))
    print(size(0), report)
