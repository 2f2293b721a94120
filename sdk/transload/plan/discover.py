"""A first cluster file from the machine this runs on: what nvidia-smi, npu-smi and /proc say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from transload.plan.catalogue import DeviceType, devices
from transload.plan.cluster import Cluster
from transload.plan.units import show_bytes

_TIMEOUT = 20  # seconds


def cluster_text() -> str:
    """A commented YAML cluster file for this machine; an example to fill in where no device was found."""
    found = [*_nvidia(), *_ascend()]
    ram = _memory("MemTotal")
    spare = max(ram - (16 << 30), 0) >> 30
    free = show_bytes(shutil.disk_usage(tempfile.gettempdir()).free)
    head = [
        "# A cluster for `transload plan MODEL --cluster THIS_FILE`.",
        "# Sizes take B, KB, MB, GB, TB (powers of ten) and KiB, MiB, GiB, TiB. Device names: docs/planner.md.",
        "name: my-cluster",
        "",
        "nodes:",
        f"  - name: {_host()}",
        "    # count: 4              # so many equal machines, named NAME-0, NAME-1, ...",
        "    # address: 10.0.0.1     # how the others reach it, for launch files",
    ]
    body = _device_lines(found) if found else _no_device_lines(ram)
    tail = [
        f"    host_memory: {spare if found else 0} GiB    # RAM that layers may be offloaded to",
        f"    disk: 0 GiB             # disk that layers may be offloaded to, {free} are free here",
        "",
        "links:",
        "  between_nodes: 25 GB      # bytes a second and node, one direction (200 Gb/s = 25 GB)",
        "  latency: 0.00001          # seconds",
        "",
    ]
    return "\n".join([*head, *body, *tail])


def this_machine() -> Cluster:
    """This machine as a cluster of one node, with what is free of it now: for placing a model here."""
    entries: list[dict[str, object]] = []
    for name, total, free in _nvidia_memory():
        known = match(name)
        entry: dict[str, object] = {"type": known.name if known is not None else "gpu", "platform": "cuda"}
        entries.append({**entry, "memory": total, "usable": max(0.01, min(1.0, free / total))})
    for name, count, memory in _ascend():
        known = match(name)
        entry = {"type": known.name if known is not None else "npu", "platform": "ascend", "count": count}
        entries.append({**entry, **({"memory": memory} if memory else {})})
    free_ram = max(_memory("MemAvailable") - (1 << 30), 1 << 28)
    disk = shutil.disk_usage(tempfile.gettempdir()).free // 2
    if not entries:
        entries, free_ram = [{"type": "CPU", "memory": free_ram}], 0
    node = {"name": _host(), "devices": entries, "host_memory": free_ram, "disk": disk}
    return Cluster.model_validate({"name": "this machine", "nodes": [node]})


def _device_lines(found: list[tuple[str, int, int]]) -> list[str]:
    lines = ["    devices:"]
    for name, count, memory in found:
        known = match(name)
        if known is not None:
            lines.append(f"      - type: {known.name}   # reported as {name}, {show_bytes(memory)}")
            lines.append(f"        count: {count}")
            lines.append("        # usable: 0.9          # when other programs use the devices too")
        else:
            lines += [
                f"      - type: {re.sub(r'[^A-Za-z0-9._-]+', '-', name)}   # not in the catalogue: check these numbers",
                f"        count: {count}",
                "        platform: cuda",
                f"        memory: {memory}",
                "        bandwidth: 1000 GB",
                "        link: 32 GB",
            ]
    return lines


def _no_device_lines(ram: int) -> list[str]:
    return [
        "    # No accelerator was found here, so this machine's CPU stands below. For a cluster elsewhere write, say:",
        "    #   devices:",
        "    #     - type: H100          # or A3 (a die of an Atlas 800 A3), 910B3, RTX-4090, ...",
        "    #       count: 8",
        "    devices:",
        "      - type: CPU",
        f"        memory: {ram >> 30} GiB",
    ]


def match(name: str) -> DeviceType | None:
    """The catalogue entry whose name, without spaces and dashes, is the longest one inside a reported name."""
    plain = _plain(name)
    hits = [
        (len(_plain(alias)), alias, d) for alias, d in devices().items() if len(alias) > 1 and _plain(alias) in plain
    ]
    return max(hits, key=lambda h: (h[0], h[1]))[2] if hits else None


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _nvidia() -> list[tuple[str, int, int]]:
    counts: dict[tuple[str, int], int] = {}
    for name, total, _ in _nvidia_memory():
        counts[name, total] = counts.get((name, total), 0) + 1
    return [(name, count, memory) for (name, memory), count in counts.items()]


def _nvidia_memory() -> list[tuple[str, int, int]]:
    """(name, total bytes, free bytes) of every card that nvidia-smi lists."""
    out = _run(["nvidia-smi", "--query-gpu=name,memory.total,memory.free", "--format=csv,noheader,nounits"])
    rows = [[field.strip() for field in line.rsplit(",", 2)] for line in out.splitlines()]
    return [
        (row[0], int(row[1]) << 20, int(row[2]) << 20)
        for row in rows
        if len(row) == 3 and row[1].isdecimal() and row[2].isdecimal() and int(row[1])
    ]


def _ascend() -> list[tuple[str, int, int]]:
    """Chips in `npu-smi info`: rows such as "| 0     910B3  | OK ..." with "used / total" of the HBM in MB after it."""
    out = _run(["npu-smi", "info"])
    names = re.findall(r"^\|\s*\d+\s+(910\S*|310\S*|950\S*|Ascend\S*)\s*\|", out, re.MULTILINE)
    totals = [int(t) for t in re.findall(r"/\s*(\d{4,6})\s*\|", out)]
    counts: dict[str, int] = {}
    for name in names:
        counts[name] = counts.get(name, 0) + 1
    return [(name, count, (max(totals) if totals else 0) << 20) for name, count in counts.items()]


def _run(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _memory(row: str) -> int:
    """Bytes in a row of /proc/meminfo, 16 GiB where there is none."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 16 << 30
    found = re.search(rf"{row}:\s*(\d+) kB", text)
    return int(found[1]) << 10 if found else 16 << 30


def _host() -> str:
    name = re.sub(r"[^A-Za-z0-9.-]", "-", os.uname().nodename).strip("-.")
    return name or "node"
