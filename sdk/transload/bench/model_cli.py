"""`transload bench model`: prompt processing and decoding of a whole model beside every engine that is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from transload.bench.timing import Clock

ENV_HELP = "Python of another environment: llama.cpp (xllamacpp, llama-cpp-python), onnxruntime-genai. May be repeated."
ONLY_HELP = "Name of an engine as the table shows it; may be repeated. Default: all that are there."


def model(
    path: Annotated[Path, typer.Argument(help="A GGUF file or a model folder.")],
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.", min=2)] = 512,
    decode_tokens: Annotated[int, typer.Option(help="Tokens after the first.", min=1)] = 128,
    threads: Annotated[int | None, typer.Option(help="Threads for everyone; all cores if left out.", min=1)] = None,
    rounds: Annotated[int, typer.Option(help="Turns of every engine, after one that does not count.", min=1)] = 5,
    clock: Annotated[
        str, typer.Option(help="wall, or cpu: processor time, for one thread on a busy machine.")
    ] = "wall",
    env: Annotated[list[Path] | None, typer.Option(help=ENV_HELP)] = None,
    only: Annotated[list[str] | None, typer.Option(help=ONLY_HELP)] = None,
    onnx: Annotated[
        Path | None, typer.Option(help="The model as `port --to onnx` made it, for onnxruntime-genai.")
    ] = None,
    text: Annotated[
        str, typer.Option(help="Text file for the prompt; Python's docstrings if left out.")
    ] = "docstrings",
    limits: Annotated[bool, typer.Option(help="Measure the read bandwidth between the rounds.")] = True,
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write one JSON object an engine, with every round.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a table for a document.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture.")] = None,
) -> None:
    """Times a model in Transload (W4A16, W4A8), transformers, llama.cpp and onnxruntime-genai, turn by turn."""
    from rich.console import Console

    from transload.bench import model as bench
    from transload.bench import model_report
    from transload.bench.matmul import load_average
    from transload.bench.model_engines import Settings
    from transload.evaluation.text import read_text
    from transload.hal import find_device

    console = Console()
    if not console.is_terminal:
        console = Console(width=132)
    count = threads or _cores()
    settings = Settings(
        *(count, prompt_tokens, decode_tokens, rounds, checked_clock(clock)),
        *(tuple(env or ()), tuple(only or ()), onnx, read_text(text), limits),
    )
    found = find_device("cpu")[1]
    with console.status("") as status:
        result = bench.run(path, settings, lambda what: status.update(what))
    console.print(f"[bold]{path.name}[/] on {found.model}, {count} threads, medians of {rounds} rounds\n")
    console.print(model_report.table(result))
    console.print()
    for line in model_report.notes(result):
        console.print(line, style="dim", highlight=False)
    for name, why in result.absent.items():
        console.print(f"not timed: {name}: {why}", style="dim", highlight=False)
    for line in model_report.warnings(result):
        console.print(line, style="yellow", highlight=False)
    if load_average() > count + 0.5:
        console.print(
            f"load average {load_average():.1f} with {count} threads: only ratios mean anything", style="yellow"
        )
    if csv:
        model_report.write_csv(result, csv)
    if json:
        model_report.write_json(result, json)
    if markdown:
        model_report.write_markdown(result, markdown)
    if plot:
        model_report.plot(result, plot)


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def checked_clock(name: str) -> Clock:
    """wall or cpu. Raises ConfigError for another word."""
    from transload.errors import ConfigError

    if name not in ("wall", "cpu"):
        raise ConfigError(f"clock '{name}': give wall or cpu")
    return "cpu" if name == "cpu" else "wall"
