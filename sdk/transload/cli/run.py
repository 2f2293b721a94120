"""`transload run`: text from a checkpoint on the device that is here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transload.cli import app
from transload.cli.show import byte_progress, print_json, size
from transload.errors import ConfigError
from transload.memory import peak_memory

if TYPE_CHECKING:
    from transload.runtime import Generation, Report


@app.command()
def run(
    path: Annotated[Path, typer.Argument(help="A GGUF file or a model folder of any format that Transload reads.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="What to ask; standard input if left out.")
    ] = None,
    scheme: Annotated[
        str | None, typer.Option(help="w4a16 (float activations) or w4a8 (int8 activations); as stored if left out.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Round a float checkpoint to this many bits on load (4 or 8).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda:0, npu:0 ...")] = "auto",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    packed_cache: Annotated[
        bool, typer.Option("--packed-cache", help="Keep packed weights beside the model: the next start maps them.")
    ] = False,
    packed_cache_at: Annotated[
        Path | None, typer.Option(help="The same in another folder, or in a file that ends in .packed.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print the answer, tokens, speeds and the report as JSON.")
    ] = False,
) -> None:
    """Loads a model and answers a prompt, streaming. Says which kernels ran, in which precision, and how fast."""
    asked = prompt if prompt is not None else _standard_input()
    from transload.runtime import generate, load, report

    with byte_progress("loading", quiet=json) as update:
        kept = packed_cache_at or packed_cache
        model = load(
            path, device, scheme, bits=bits, progress=lambda done, total: update(done, total, ""), packed_cache=kept
        )
    show = None if json else _write
    answer = generate(model, asked, max_new_tokens, temperature=temperature, seed=seed, stream=show, chat=not raw)
    if json:
        print_json(_json(answer, report(model)))
        return
    print(flush=True)
    _print_report(answer, report(model))


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise ConfigError("no prompt: give --prompt TEXT, or pipe the text in")
    return sys.stdin.read()


def _write(piece: str) -> None:
    print(piece, end="", flush=True)


def _json(answer: Generation, ran: Report) -> dict[str, object]:
    from dataclasses import asdict

    speeds = {
        "prompt_tokens_per_second": answer.prompt_tokens_per_second,
        "tokens_per_second": answer.tokens_per_second,
    }
    return {**asdict(answer), **speeds, "peak_memory_bytes": peak_memory(), "report": asdict(ran)}


def _print_report(answer: Generation, ran: Report) -> None:
    from rich.console import Console

    lines = [
        f"{answer.prompt_tokens} prompt tokens at {answer.prompt_tokens_per_second:.1f}/s, "
        f"{len(answer.tokens)} tokens at [bold]{answer.tokens_per_second:.1f} tokens/s[/]"
        + ("" if answer.ended else " (stopped at --max-new-tokens)")
        + (f", peak memory {size(peak)}" if (peak := peak_memory()) else ""),
        *str(ran).splitlines(),
    ]
    console = Console(stderr=True)
    for line in lines:
        console.print(line, style="dim", highlight=False)
