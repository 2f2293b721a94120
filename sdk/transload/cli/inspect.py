"""`transload inspect`: what a checkpoint is and who can run it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transload.cli import app
from transload.cli.show import pairs, print_json, short_role, size, table

if TYPE_CHECKING:
    from rich.table import Table

    from transload.inspection import Inspection, Verdict


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A GGUF or safetensors file, or a model folder.")],
    every: Annotated[bool, typer.Option("--all", help="List float tensors too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Shows the scheme of every module, bytes, and which backends and engines run it. Reads headers only."""
    from transload.inspection import inspect as look

    found = look(path)
    if json:
        print_json(found)
        return
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(pairs(_summary(found)))
    console.print(_modules(found, every))
    for note in found.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    console.print(_verdicts("who runs it here", found.backends))
    console.print(_verdicts("engines", found.engines))


def _summary(found: Inspection) -> dict[str, str]:
    bits = 8 * found.stored_bytes / max(found.parameters, 1)
    return {
        "checkpoint": found.path,
        "format": found.format,
        "architecture": found.architecture,
        "size": f"{size(found.stored_bytes)}, {found.parameters / 1e6:,.0f} M parameters, {bits:.2f} bits each",
    }


def _modules(found: Inspection, every: bool) -> Table:
    large = [g for g in found.groups if every or len(g.shape) > 1]
    rows = [
        (short_role(g.role), g.scheme, " x ".join(map(str, g.shape)), str(g.count), size(g.stored_bytes)) for g in large
    ]
    rest = [g for g in found.groups if g not in large]
    if rest:
        count, total = sum(g.count for g in rest), sum(g.stored_bytes for g in rest)
        rows.append(("[dim]norms and biases (--all)[/]", "float", "", str(count), size(total)))
    return table(("module", "scheme", "shape", ">count", ">bytes"), rows, "modules")


def _verdicts(title: str, verdicts: tuple[Verdict, ...]) -> Table:
    return table(("", "", "how, or why not"), [(v.name, *_answer(v)) for v in verdicts], title)


def _answer(v: Verdict) -> tuple[str, str]:
    from rich.markup import escape

    if v.runs:
        return "[green]yes[/]", escape(", ".join(v.executed) + "".join(f"; {note}" for note in v.notes))
    roles: dict[str, list[str]] = {}
    for role, reason in v.reasons.items():
        roles.setdefault(reason, []).append(role.rsplit(".", 1)[-1])
    if len(roles) == 1 and not v.executed:
        return "[red]no[/]", escape(next(iter(roles)))
    lines = [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in roles.items()]
    return "[red]no[/]", escape("\n".join(lines))
