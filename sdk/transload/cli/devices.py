"""`transload devices`: what this machine can run, and for what it cannot, why and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from transload.cli import app
from transload.cli.show import print_json, size, table

if TYPE_CHECKING:
    from rich.console import Console

    from transload.hal import Backend, Device
    from transload.quant import QuantSpec


Json = dict[str, Any]


@app.command()
def devices(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Lists every backend: devices, memory, instruction sets, kernels, and what is missing with the remedy."""
    from transload.hal import backends

    found = [_describe(backend) for _, backend in sorted(backends().items())]
    if json:
        print_json(found)
        return
    from rich.console import Console

    console = Console()
    for backend in found:
        _print_backend(console, backend)


def _print_backend(console: Console, backend: Json) -> None:
    from rich.markup import escape

    if backend["unavailable"]:
        console.print(f"[bold]{backend['backend']}[/]  [yellow]not available[/]: {escape(backend['unavailable'])}\n")
        return
    console.print(f"[bold]{backend['backend']}[/]  [green]available[/]")
    for device in backend["devices"]:
        console.print(f"  {backend['backend']}:{device['index']}  [bold]{escape(device['model'])}[/]")
        console.print(f"  {escape(device['arch'])}", style="dim")
        console.print(f"  {size(device['memory'])}, {size(device['free'])} free")
        if not device["kernels"]:
            console.print("  no kernels yet\n")
            continue
        console.print(table(("kernel", "", "takes, or why not"), [_kernel_row(k) for k in device["kernels"]]))
        console.print(table(("asked for", "runs on"), _chosen(device["kernels"])))


def _kernel_row(kernel: Json) -> tuple[str, str, str]:
    """What one kernel takes; a reason that covers every problem is given once."""
    from rich.markup import escape

    takes = [p["problem"] for p in kernel["problems"] if p["refusal"] is None]
    reasons = dict.fromkeys(p["refusal"] for p in kernel["problems"] if p["refusal"] is not None)
    if not takes:
        return kernel["kernel"], "[yellow]no[/]", escape("; ".join(reasons))
    what = "everything below" if not reasons else ", ".join(takes)
    return kernel["kernel"], "[green]yes[/]", escape(what)


def _chosen(kernels: list[Json]) -> list[tuple[str, str]]:
    """The first kernel that takes each problem: what would run."""
    rows = []
    for asked in zip(*(k["problems"] for k in kernels), strict=True):
        taker = next(
            (k["kernel"] for k, p in zip(kernels, asked, strict=True) if p["refusal"] is None), "[red]nothing[/]"
        )
        rows.append((asked[0]["problem"], taker))
    return rows


def _describe(backend: Backend) -> Json:
    reason = backend.unavailable()
    found = [] if reason else [_describe_device(backend, device) for device in backend.devices()]
    return {"backend": backend.name, "unavailable": reason, "devices": found}


def _describe_device(backend: Backend, device: Device) -> Json:
    from transload.hal import Problem

    kernels = []
    for kernel in backend.kernels:
        asked = [(name, Problem(4096, 4096, spec, experts=experts)) for name, spec, experts in _probes()]
        problems = [{"problem": name, "refusal": kernel.refuses(p, device)} for name, p in asked]
        kernels.append({"kernel": kernel.name, "problems": problems})
    fields = ("index", "model", "arch", "memory", "free")
    return {**{f: getattr(device, f) for f in fields}, "kernels": kernels}


def _probes() -> list[tuple[str, QuantSpec, int | None]]:
    """The schemes that people ask for, to show which kernel takes which."""
    from transload.quant import PER_CHANNEL, ActSpec, QuantSpec, Zero

    group, token = ActSpec(group_size=128), ActSpec()
    return [
        ("W4A16 g128", QuantSpec(4, 128), None),
        ("W4A16 g32 mins", QuantSpec(4, 32, zero=Zero.MINS), None),
        ("W8A16 g32", QuantSpec(8, 32), None),
        ("W4A8 g128", QuantSpec(4, 128, act=group), None),
        ("W4A8 per token", QuantSpec(4, 128, act=token), None),
        ("W8A8 per token", QuantSpec(8, PER_CHANNEL, act=token), None),
        ("MoE W4A16", QuantSpec(4, 128), 8),
        ("MoE W4A8", QuantSpec(4, 128, act=group), 8),
    ]
