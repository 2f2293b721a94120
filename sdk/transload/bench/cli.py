"""`transload bench`: times kernels beside every library that does the same and is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from transload.bench.model_cli import checked_clock, model

app = typer.Typer(help="Time kernels and models beside everyone who does the same.", no_args_is_help=True)

SHAPE_HELP = "NxK, or EXPERTSxNxK; may be repeated. Default: layers of small and 7-billion-parameter models."


@app.command()
def matmul(
    device: Annotated[str, typer.Option(help="A device as `transload devices` lists it.")] = "cpu",
    shape: Annotated[list[str] | None, typer.Option(help=SHAPE_HELP)] = None,
    rows: Annotated[list[int] | None, typer.Option("--rows", "-m", help="Rows M of the activations.")] = None,
    group: Annotated[list[int] | None, typer.Option(help="Group sizes.")] = None,
    scheme: Annotated[list[str] | None, typer.Option(help="w4a8, w4a16.")] = None,
    threads: Annotated[int, typer.Option(help="Threads for everyone.", min=1)] = 1,
    rounds: Annotated[int, typer.Option(help="Turns of every contender.", min=1)] = 7,
    seconds: Annotated[float, typer.Option(help="Length of a turn.", min=0.001)] = 0.03,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: processor time, for one thread on a busy machine.")
    ] = "wall",
    peers: Annotated[bool, typer.Option(help="Time other libraries too.")] = True,
    env: Annotated[list[Path] | None, typer.Option(help="Python of another environment whose libraries join.")] = None,
    limits: Annotated[bool, typer.Option(help="Measure memory and multiply rates first.")] = True,
    csv: Annotated[Path | None, typer.Option(help="Write every time as CSV.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write one JSON object a case.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a table for a document.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
    minutes: Annotated[float | None, typer.Option(help="On a GPU: begin nothing new after so long.")] = None,
) -> None:
    """Multiplies 4-bit weights: microseconds, relative error, and the ratio to the best peer of the same scheme."""
    from rich.console import Console

    from transload.bench import cases, matmul, report
    from transload.bench.gpu_clock import Machine
    from transload.bench.limits import measure
    from transload.errors import ConfigError
    from transload.hal import find_device

    console = Console()
    if not console.is_terminal:
        console = Console(width=132)
    backend, found = find_device(device)
    kind = backend.torch_device(found).type
    if kind == "cuda":
        from transload.bench import gpu_cli

        if env or threads != 1 or clock != "wall":
            raise ConfigError("--env, --threads and --clock are for processors; a GPU is timed by its own clock")
        plan = gpu_cli.plan(shape, rows, group, scheme, peers, minutes)
        machine = Machine(found, backend.torch_device(found), tuple(backend.kernels), replays=rounds)
        gpu_cli.measure(plan, machine, gpu_cli.Files(csv, json, markdown, plot), typer.echo)
        return
    if kind != "cpu":
        raise ConfigError(f"device '{device}': this command measures cpu and cuda; ci/device holds scripts for others")
    shapes = [cases.parse_shape(s) for s in shape or ()] or [*cases.SHAPES, cases.EXPERTS]
    chosen = list(cases.cases(shapes, rows or cases.ROWS, group or cases.GROUPS, scheme or cases.SCHEMES))
    rates = measure(threads, checked_clock(clock)) if limits and backend.name == "cpu" else None
    console.print(f"[bold]{found.model}[/]  {found.arch}  {threads} threads, {len(chosen)} cases")
    if rates:
        read, int8, bf16 = rates.read / 1e9, rates.int8 / 1e9, rates.bf16 / 1e9
        console.print(f"read {read:.1f} GB/s, dense int8 {int8:.0f} GOP/s, dense bf16 {bf16:.0f} GFLOP/s", style="dim")
    settings = matmul.Settings(threads, rounds, seconds, peers, tuple(env or ()), rates, checked_clock(clock))
    done = []
    with console.status("") as status:
        for case, row in zip(chosen, matmul.run(backend, found, chosen, settings), strict=True):
            done.append(row)
            if json:  # after every case, so that an interrupted run keeps what it has
                report.write_json(done, json)
            status.update(f"{len(done)} of {len(chosen)}: {case.label} M={case.m}")
    console.print(report.table(done))
    for line in report.summary(done):
        console.print(line)
    for name, why in sorted({item for row in done for item in row.absent.items()}):
        console.print(f"[dim]not timed: {name}: {why}[/]")
    busy = matmul.load_average()
    if busy > threads + 0.5:
        console.print(f"[yellow]load average {busy:.1f} with {threads} threads: only the ratios mean anything[/]")
    if csv:
        report.write_csv(done, csv)
    if markdown:
        report.write_markdown(done, markdown)
    if plot:
        report.plot(done, plot)


app.command()(model)
