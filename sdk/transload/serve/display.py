"""How a start looks: a bar for every engine that moves with its log, and a sentence for everything worth keeping."""

from __future__ import annotations

import re
import threading
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from transload.serve.events import Event

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # an engine's words must not drive the terminal
_KEPT = {
    "starting": "dim",
    "cache": "",
    "drift": "yellow",
    "ready": "bold green",
    "peer": "",
    "failed": "bold red",
    "restarting": "yellow",
    "draining": "",
    "stopped": "dim",
    "notice": "yellow",
}
# How far a start is when a stage begins, and when it ends, of 100. Only the order is exact.
_STAGES = (
    ("reading the configuration", 4, 10),
    ("starting workers", 10, 20),
    ("joining", 20, 28),
    ("workers joined", 28, 30),
    ("loading weights", 30, 60),
    ("weights loaded", 60, 62),
    ("compiling", 62, 80),
    ("capturing graphs", 80, 94),
    ("graphs captured", 94, 95),
    ("starting the server", 95, 99),
)


def plain(text: str) -> str:
    """Text without control characters."""
    return _CONTROL.sub(" ", text)


def share(stage: str, fraction: float | None) -> float | None:
    """How far a start is, 0 to 100; None for a stage that is not known."""
    for name, begin, end in _STAGES:
        if stage.startswith(name):
            return begin + (end - begin) * (fraction or 0.0)
    return None


class Display:
    """A listener that shows events on a console; as plain lines where that is no terminal. Used in a `with` block."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._rows: dict[str, TaskID] = {}
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("[bold]{task.fields[engine]}"),
            BarColumn(24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Display:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Shows one event; called from any thread."""
        with self._lock:
            if event.kind in _KEPT:
                style = _KEPT[event.kind]
                text = f"[dim]{escape(event.engine)}[/] " + (f"[{style}]" if style else "") + escape(plain(event.text))
                self._console.print(text + ("[/]" if style else ""), highlight=False, soft_wrap=True)
            elif event.kind == "stage" and not self._console.is_terminal:
                self._console.print(
                    f"{event.engine} {plain(event.text)}", markup=False, highlight=False, soft_wrap=True
                )
            self._move(event)

    def _move(self, event: Event) -> None:
        if event.engine not in self._rows:
            self._rows[event.engine] = self._bars.add_task("starting", total=100, engine=event.engine)
        row = self._rows[event.engine]
        if event.kind == "starting":
            self._bars.reset(row, description="starting", completed=2)
        elif event.kind in ("stage", "loading"):
            stage, fraction = str(event.data.get("stage", event.text)), event.data.get("fraction")
            done = share(stage, None if fraction is None else float(fraction))
            self._bars.update(row, description=escape(plain(event.text)), completed=done)
        elif event.kind in ("ready", "load", "draining"):
            texts = {"ready": f"serving at {event.data.get('url')}", "draining": "finishing requests"}
            self._bars.update(row, description=escape(plain(texts.get(event.kind, event.text))), completed=100)
        elif event.kind in ("failed", "stopped"):
            self._bars.update(row, description=event.kind)
