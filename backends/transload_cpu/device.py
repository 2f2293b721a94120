"""What the host processor is: model, instruction sets that matter here, and memory that this process may use."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from transload.hal import Device

# /proc/cpuinfo flag -> the name that Device.arch shows. Order is oldest first.
INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "asimddp": "asimddp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}

ROOT = Path("/")


def host(root: Path = ROOT) -> Device:
    """The processor as a Device. `root` is where /proc and /sys are looked for."""
    info = cpuinfo(root)
    machine = platform.machine() or "unknown"
    flags = set((info.get("flags") or info.get("features") or "").split())
    sets = [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]
    model = info.get("model name") or info.get("hardware") or platform.processor() or machine
    memory, free = memory_bytes(root)
    return Device("cpu", 0, model, " ".join([machine, *sets]), memory, free)


def cpuinfo(root: Path = ROOT) -> Mapping[str, str]:
    """The first processor's lines of /proc/cpuinfo with lower-case keys, {} where there is no such file."""
    try:
        text = (root / "proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return {}
    info: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            info.setdefault(key.strip().lower(), value.strip())
    return info


def memory_bytes(root: Path = ROOT) -> tuple[int, int]:
    """(total, free) bytes that this process may use: the machine's, or its control group's where that is less."""
    machine = psutil.virtual_memory()
    total, free = int(machine.total), int(machine.available)
    for limit, used in _cgroup_limits(root):
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return total, free


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """(limit, used) bytes of every control group above this process that has a limit.

    Version 2 has one tree, named by the line "0::/path" of /proc/self/cgroup; version 1 has a tree for memory. Inside a
    container the path may lie outside what is mounted; the root of the mount is then the container's own group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            tree, limit_file, used_file = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            tree, limit_file, used_file = (
                root / "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        group = tree / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = _number(folder / limit_file), _number(folder / used_file)
            if limit is not None and used is not None:
                limits.append((limit, used))
            if folder == tree:
                break
    return limits


def _number(path: Path) -> int | None:
    """The number in a file; None for "max", for no file, and for version 1's way of saying no limit (near 2**63)."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() and int(text) < 1 << 60 else None
