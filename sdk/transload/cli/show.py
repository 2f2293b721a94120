"""What commands share when they print: sizes a person can read, JSON for machines, progress with rates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_json(value: object) -> None:
    """Prints a dataclass, mapping or list as indented JSON."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    print(json.dumps(plain, indent=2, default=str))


def size(count: int | float) -> str:
    """Bytes in decimal units: 491.4 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> Table:
    """A plain table; columns whose name starts with '>' are aligned right."""
    from rich import box
    from rich.table import Table

    out = Table(
        title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold", pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in columns:
        right = column.startswith(">")
        out.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        out.add_row(*row)
    return out


def pairs(rows: Mapping[str, str]) -> Table:
    """Names and values in two columns without a frame."""
    from rich.table import Table

    out = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        out.add_row(f"[dim]{name}[/]", value)
    return out


def short_role(name: str) -> str:
    """A module's name for tables: numbers as *, without the leading "model."."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name).removeprefix("model.")


@contextmanager
def byte_progress(label: str, quiet: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar over bytes with a rate. Yields update(done, total, what), for use as a callback."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as progress:
        task = progress.add_task(label, total=None, what="")
        yield lambda done, total, what: progress.update(task, completed=done, total=total, what=what)
