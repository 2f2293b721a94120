"""`transload eval`: how good a model is, alone or beside the one it was made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transload.cli import app
from transload.cli.show import pairs, print_json, size, table

if TYPE_CHECKING:
    from transload.evaluation import EvalReport

BROKEN = 2  # exit code of a run whose limits do not hold


@app.command()
def eval(
    path: Annotated[
        Path, typer.Argument(help="The model: a GGUF file or a folder of any format that Transload reads.")
    ],
    against: Annotated[
        Path | None,
        typer.Option(help="The model it was made from; the same path with another scheme compares schemes."),
    ] = None,
    text: Annotated[
        str, typer.Option(help="A UTF-8 file, or 'docstrings': Python's own documentation.")
    ] = "docstrings",
    tokens: Annotated[int, typer.Option(help="Read at most this many tokens.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens that the model reads at once.")] = 1024,
    stride: Annotated[int | None, typer.Option(help="How far windows are apart; half a window if left out.")] = None,
    scheme: Annotated[str | None, typer.Option(help="w4a16 or w4a8; as stored if left out.")] = None,
    bits: Annotated[int | None, typer.Option(help="Round a float checkpoint to this many bits on load.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, npu:0 ...")] = "auto",
    against_scheme: Annotated[str | None, typer.Option(help="The source's scheme, if it is quantized too.")] = None,
    against_device: Annotated[str, typer.Option(help="Where the source runs.")] = "auto",
    tasks: Annotated[
        str | None,
        typer.Option(help="Also run these lm-evaluation-harness tasks (comma separated; data must be local)."),
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="A folder with task files of your own.")] = None,
    fail_if: Annotated[
        list[str] | None, typer.Option(help="A limit such as 'kl>0.05' (repeatable): exit code 2 when it holds true.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a report with plots to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing report.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
) -> None:
    """Measures perplexity, speed and memory; with --against also KL divergence, agreement and noise layer by layer."""
    from transload.evaluation import Request, evaluate
    from transload.evaluation.harness import check_tasks, run_tasks
    from transload.evaluation.limits import parse_limits
    from transload.evaluation.output import check_free, write_page

    limits = parse_limits(fail_if or [], against is not None)
    names = check_tasks(tasks)
    check_free(html, overwrite)
    asked = Request(path, device, scheme, bits)
    source = None if against is None else Request(against, against_device, against_scheme)
    with _token_progress(quiet=json) as update:
        report = evaluate(asked, source, text, tokens, window, stride, progress=update)
    scores = run_tasks(asked, names, task_folder)
    broken = [sentence for limit in limits if (sentence := limit.broken_by(report.metrics()))]
    if html is not None:
        write_page(report, html, broken, len(limits))
    if json:
        print_json({**dict(report.as_json()), "tasks": scores, "broken_limits": broken})  # type: ignore[call-overload]
    else:
        _print(report, scores, broken, len(limits), html)
    if broken:
        raise typer.Exit(BROKEN)


def _print(
    report: EvalReport, scores: dict[str, dict[str, float]], broken: list[str], limits: int, html: Path | None
) -> None:
    from rich.console import Console

    from transload.evaluation.table import quality_rows, subject_rows

    console = Console()
    subjects = [report.model, *([report.source] if report.source is not None else [])]
    columns = [subject_rows(subject) for subject in subjects]
    names = ["", "model", "source"][: len(subjects) + 1]
    console.print(table(names, [[row, *(column[row] for column in columns)] for row in columns[0]]))
    if report.difference is not None:
        console.print(pairs(quality_rows(report.difference)))
        worst = report.difference.worst[:5]
        rows = [
            [f"{w.kl:.3f}", _line(w.before), _line(w.token), _line(w.source_likeliest), _line(w.likeliest)]
            for w in worst
        ]
        console.print(table([">KL", "after", "token", "source expects", "model expects"], rows))
    for task, found in scores.items():
        console.print(f"{task}: " + ", ".join(f"{name} {value:.4g}" for name, value in found.items()))
    where = f"{report.tokens} tokens of {report.text}, window {report.window}, stride {report.stride}"
    console.print(f"{where}, peak memory {size(report.peak_memory)}", style="dim", highlight=False)
    for sentence in broken:
        console.print(f"[bold red]limit broken[/] {sentence}", highlight=False)
    if limits and not broken:
        console.print(f"[green]all {limits} limits hold[/]")
    if html is not None:
        console.print(f"report: {html}", highlight=False)


def _line(text: str) -> str:
    from rich.markup import escape

    return escape(repr(text)[1:-1])


@contextmanager
def _token_progress(quiet: bool) -> Iterator[Callable[[int, int, str], None]]:
    """Progress over tokens with a rate, one bar a model."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        bars: dict[str, TaskID] = {}

        def update(done: int, total: int, what: str) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total, rate="tokens")
            speed = progress.tasks[bars[what]].speed
            progress.update(bars[what], completed=done, rate=f"tokens, {speed:.0f}/s" if speed else "tokens")

        yield update
