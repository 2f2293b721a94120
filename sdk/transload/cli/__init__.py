"""The command line: one function a command, one file a subject. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from transload import __version__
from transload.errors import TransloadError

app = typer.Typer(
    name="transload",
    help="Move 4-bit LLMs between NVIDIA CUDA, Huawei Ascend and CPU/ONNX, run them, and plan their deployment.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"transload {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


def main() -> None:
    """Runs the command line. A TransloadError becomes one sentence on stderr (or JSON with --json) and exit code 1."""
    # torch would import every installed vendor extension when it is imported, and fail altogether where one cannot
    # start (torch_npu without CANN). The backends import them when they are asked for, and say what is missing.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    try:
        app()
    except TransloadError as e:
        if "--json" in sys.argv:
            print(json.dumps({"error": type(e).__name__, "message": str(e)}))
        else:
            from rich.console import Console

            Console(stderr=True).print(f"[bold red]error[/] [dim]({type(e).__name__})[/]: ", end="")
            print(e, file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:
        raise SystemExit(0) from None


from transload.bench.cli import app as _bench  # noqa: E402
from transload.cli import devices, eval, inspect, port, quantize, run  # noqa: E402, F401  (each file adds its commands to `app`)
from transload.launch.cli import add_to as _add_launch  # noqa: E402
from transload.plan.cli import app as _plan  # noqa: E402
from transload.serve.cli import launch, serve  # noqa: E402

_add_launch(_plan)
app.add_typer(_plan, name="plan")
app.add_typer(_bench, name="bench")
app.command()(serve)
app.command()(launch)
