"""A first cluster file from the machine this runs on: what nvidia-smi, npu-smi and /proc say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

from transload.plan.catalogue import DeviceType, devices
from transload.plan.units import show_bytes

_TIMEOUT = 20  # seconds


def cluster_text() -> str:
    """A commented YAML cluster file for this machine; an example to fill in where no device was found."""
    found = [*_nvidia(), *_ascend()]
    ram = _ram()
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
        f"    host_memory: {max(ram - (16 << 30), 0) >> 30} GiB   # RAM that offloading may use, here all but 16 GiB",
        "    disk: 0 GiB             # disk that offloading may use",
        "",
        "links:",
        "  between_nodes: 25 GB      # bytes a second and node, one direction (200 Gb/s = 25 GB)",
        "  latency: 0.00001          # seconds",
        "",
    ]
    return "\n".join([*head, *body, *tail])


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
    out = _run(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"])
    counts: dict[tuple[str, int], int] = {}
    for line in out.splitlines():
        name, _, mib = line.rpartition(",")
        if mib.strip().isdecimal():
            key = (name.strip(), int(mib) << 20)
            counts[key] = counts.get(key, 0) + 1
    return [(name, count, memory) for (name, memory), count in counts.items()]


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


def _ram() -> int:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return 16 << 30
    found = re.search(r"MemTotal:\s*(\d+) kB", text)
    return int(found[1]) << 10 if found else 16 << 30


def _host() -> str:
    name = re.sub(r"[^A-Za-z0-9.-]", "-", os.uname().nodename).strip("-.")
    return name or "node"
