"""`transload serve` and `transload launch`: an engine on this machine, watched until it is stopped."""

from __future__ import annotations

import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from transload.errors import ConfigError

if TYPE_CHECKING:
    from types import FrameType

    from transload.serve.events import Event, Listener
    from transload.serve.run import Settings
    from transload.serve.service import Service
    from transload.serve.starting import Start

Python = Annotated[
    Path | None,
    typer.Option(
        "--engine-python", help="The Python with the engine; else TRANSLOAD_VLLM_PYTHON, this one, that of `vllm`."
    ),
]
Drain = Annotated[float, typer.Option(help="Seconds for running requests when asked to stop.", min=0)]
Timeout = Annotated[float, typer.Option("--start-timeout", help="Seconds until the engine must answer.", min=1)]
Restarts = Annotated[int, typer.Option(help="Start a failed engine again, so often in a row.", min=0)]
Logs = Annotated[
    Path | None, typer.Option(help="Folder for the engines' logs; a new one in ~/.local/state by default.")
]
Env = Annotated[list[str] | None, typer.Option("--env", help="NAME=VALUE for the engine, on top of everything.")]
Unchecked = Annotated[
    bool, typer.Option("--unchecked", help="Start even what Transload's table says the engine does not load.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the command, start nothing.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line for every event.")]
More = Annotated[list[str] | None, typer.Argument(help="After --, more arguments for the engine.")]


def serve(
    path: Annotated[Path, typer.Argument(help="A checkpoint that the engine loads as it is.")],
    arguments: More = None,
    plan: Annotated[Path | None, typer.Option(help="A plan for this machine (transload plan --save).")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the API.", min=1, max=65535)] = 8000,
    engine_python: Python = None,
    served_model_name: Annotated[str | None, typer.Option(help="What clients call it; the folder's name.")] = None,
    context: Annotated[str, typer.Option(help="Without a plan: the longest sequence, 32k = 32768.")] = "8k",
    concurrency: Annotated[int, typer.Option(help="Without a plan: sequences that run at once.", min=1)] = 16,
    tp: Annotated[int | None, typer.Option("--tp", help="Without a plan: tensor parallel size.", min=1)] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(
            help="Without a plan: KV cache on each device, 2 GiB. On a CPU, by default what --concurrency needs."
        ),
    ] = None,
    start_timeout: Timeout = 1800.0,
    drain: Drain = 60.0,
    restarts: Restarts = 0,
    logs: Logs = None,
    env: Env = None,
    unchecked: Unchecked = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Starts the engine for this machine's hardware, watches it, and drains it when stopped (Ctrl-C, SIGTERM).

    Nothing is converted: a checkpoint that the engine does not load is refused with the command that ports it.
    """
    from transload.launch import plan_from
    from transload.plan.units import parse_size
    from transload.serve.prepare import Wishes, serve_starts
    from transload.serve.run import Settings
    from transload.serve.service import log_folder

    wishes = Wishes(
        host=host,
        port=port,
        python=engine_python,
        served_name=served_model_name,
        context=context,
        concurrency=concurrency,
        tp=tp,
        kv_cache=None if kv_cache is None else parse_size(kv_cache),
        drain=drain,
        unchecked=unchecked,
        arguments=tuple(arguments or ()),
        env=_pairs(env),
    )
    starts = serve_starts(path, None if plan is None else plan_from(plan), wishes, log_folder(logs))
    _run(starts, Settings(start=start_timeout, drain=drain, restarts=restarts), dry_run, json)


def launch(
    folder: Annotated[Path, typer.Argument(help="What `transload plan render` wrote.")],
    arguments: More = None,
    node: Annotated[str, typer.Option(help="This machine's number in the plan, or its name there.")] = "0",
    engine_python: Python = None,
    start_timeout: Timeout = 1800.0,
    drain: Drain = 60.0,
    restarts: Restarts = 0,
    watch_port: Annotated[
        int, typer.Option(help="TCP port of the head on which nodes watch each other; 0 for none.", min=0, max=65000)
    ] = 29600,
    logs: Logs = None,
    env: Env = None,
    unchecked: Unchecked = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Starts what a rendered plan puts on one node, in any order of nodes, and watches it and the other nodes."""
    from transload.serve.prepare import Wishes, launch_starts
    from transload.serve.run import Settings
    from transload.serve.service import log_folder

    wishes = Wishes(
        python=engine_python, drain=drain, unchecked=unchecked, arguments=tuple(arguments or ()), env=_pairs(env)
    )
    starts = launch_starts(folder, node, wishes, log_folder(logs))
    settings = Settings(start=start_timeout, drain=drain, restarts=restarts, watch_port=watch_port)
    _run(starts, settings, dry_run, json)


def _run(starts: Sequence[Start], settings: Settings, dry_run: bool, json: bool) -> None:
    from transload.serve.service import Service

    if dry_run:
        _print(starts, json)
        return
    with _listener(json) as listener:
        service = Service(starts, settings, listener)
        with _signals(service):
            service.start()
            while (code := service.wait(0.5)) is None:
                pass
    raise typer.Exit(code)


@contextmanager
def _listener(json: bool) -> Iterator[Listener]:
    if json:
        lock = threading.Lock()

        def write(event: Event) -> None:
            with lock:
                print(event.to_json(), flush=True)

        yield write
        return
    from rich.console import Console

    from transload.serve.display import Display

    with Display(Console(stderr=True)) as display:
        yield display


@contextmanager
def _signals(service: Service) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP drain; the second one ends at once."""

    def ask(number: int, frame: FrameType | None) -> None:
        del number, frame
        service.ask_to_stop()

    names = [s for s in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, s)]
    before = {name: signal.signal(getattr(signal, name), ask) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def _print(starts: Sequence[Start], json: bool) -> None:
    from json import dumps

    for start in starts:
        own = {**start.command.env, **{k: v for k, v in start.env.items() if k in start.command.env}}
        if json:
            print(dumps({"engine": start.name, "argv": start.argv, "env": own, "log": str(start.log)}))
            continue
        for line in start.setup:
            print(shlex.join(line))
        print(" ".join([*(f"{k}={shlex.quote(v)}" for k, v in own.items()), shlex.join(start.argv)]))


def _pairs(given: Sequence[str] | None) -> dict[str, str]:
    out = {}
    for text in given or ():
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ConfigError(f"--env '{text[:80]}': expected NAME=VALUE")
        out[name] = value
    return out
