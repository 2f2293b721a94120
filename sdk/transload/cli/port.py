"""`transload port` and `transload verify`: move a checkpoint to another format, and prove that nothing changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transload.cli import app
from transload.cli.show import byte_progress, print_json, short_role, size, table

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from transload.porting import Moved, PortReport


@app.command()
def port(
    source: Annotated[Path, typer.Argument(help="A GGUF or safetensors file, or a model folder.")],
    target: Annotated[
        Path, typer.Argument(help="The folder, or with gguf the file, to write; appears only when complete.")
    ],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            help="A format (compressed-tensors, gptq, gguf, bf16) or an engine (vllm, vllm-ascend==0.23, llama.cpp).",
        ),
    ],
    arch: Annotated[
        str | None, typer.Option(help="With an engine: the hardware it runs on (sm90, amx, avx512, a2, 310p).")
    ] = None,
    requantize: Annotated[
        list[str] | None,
        typer.Option(
            help="Lossy: the scheme for modules that the target cannot hold (int4-g128, int4-g32-asym, "
            "int8-channel-a8), by role or name (attention=int8-channel-a8,experts=int4-channel-a8; may be repeated), "
            "or auto, the target's own choice."
        ),
    ] = None,
    requantize_all: Annotated[
        bool,
        typer.Option(help="Lossy: give every linear that scheme, float ones too (not heads, routers, embeddings)."),
    ] = False,
    floats: Annotated[
        str, typer.Option(help="fp32, bf16 or fp16 for quantized tensors that the target keeps in float (embeddings).")
    ] = "fp32",
    activations: Annotated[
        str, typer.Option(help="keep those of the source, or declare int8 (dynamic, per token) or 16bit.")
    ] = "keep",
    layout: Annotated[
        str,
        typer.Option(
            help="stored keeps the names; native turns ChatGLM's own layout (ChatGLM2/3, GLM-4-9b) into transformers' "
            "GlmForCausalLM, which needs no remote code; remote turns it back."
        ),
    ] = "stored",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the target if it exists.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a port that was killed.")] = False,
    modules: Annotated[bool, typer.Option("--modules", help="One row for every module.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Writes the same numbers in another format. Refuses what the format cannot hold unless --requantize is given."""
    from transload.porting import port as run_port

    with byte_progress("porting", quiet=json) as update:
        report = run_port(
            source,
            target,
            to,
            arch=arch,
            requantize=requantize,
            requantize_all=requantize_all,
            floats=floats,
            activations=activations,
            layout=layout,
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


def _print_report(console: Console, report: PortReport, every: bool) -> None:
    from rich.markup import escape

    console.print(_modules(report, every))
    rate = report.bytes_before / max(report.seconds, 1e-9)
    files = f" and {len(report.files)} files" if report.files else ""
    proof = "[green]every number is exact[/]" if report.exact else "[yellow]some numbers changed, see above[/]"
    console.print(
        f"[bold]{escape(report.target)}[/]: {size(report.bytes_before)} -> {size(report.bytes_after)} in "
        f"{report.seconds:.1f} s ({size(rate)}/s); {report.carried} float tensors{files} carried; "
        f"read back and compared: {proof}"
    )
    if report.executed:
        console.print(_executed(report))
    for note in report.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    console.print()
    console.print(table(("engine", "", "command, or why not"), _engines(report)))


def _engines(report: PortReport) -> list[tuple[str, str, str]]:
    """Engines that run the result, then those that do not; those that load other formats share a row."""
    from rich.markup import escape

    others = [a.engine for a in report.engines if a.reason is not None and a.reason.startswith("loads ")]
    rows = [(a.engine, "[green]yes[/]", escape(a.command)) for a in report.engines if a.command is not None]
    rows += [(a.engine, "[red]no[/]", escape(a.reason)) for a in report.engines if a.reason and a.engine not in others]
    return rows + ([("others", "[red]no[/]", f"load other formats: {', '.join(others)}")] if others else [])


def _executed(report: PortReport) -> Table:
    """What the target's engine really multiplies with."""
    rows = [
        (
            "routed experts" if e.experts else "layers",
            e.requested,
            e.written,
            f"[green]{e.executed}[/]" if e.as_requested else f"[yellow]{e.executed}[/]",
            e.kernel,
            str(e.modules),
        )
        for e in report.executed
    ]
    return table(("precision", "asked for", "written", "runs as", "kernel", ">count"), rows)


def _modules(report: PortReport, every: bool) -> Table:
    groups: dict[tuple[str, str, str, str], list[Moved]] = {}
    for m in report.modules:
        role = m.name if every else short_role(m.name)
        groups.setdefault((role, m.source, m.target, m.action), []).append(m)
    rows = []
    for (role, source, target, action), moved in groups.items():
        changed = [m.difference for m in moved if m.difference is not None]
        worst = min((d.sqnr_db for d in changed), default=None)
        how = f"[green]{action}, exact[/]" if worst is None else f"[yellow]{action}, SQNR {worst:.1f} dB[/]"
        rows.append((role, source, target, how, str(len(moved))))
    return table(("module", "from", "to", "how", ">count"), rows)
