"""What npu-smi says: the NPUs that the driver sees, before CANN or torch come in."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

MIB = 1 << 20
SECONDS = 30  # npu-smi takes seconds on a full machine; a wedged driver never answers

# A chip takes two lines of the table:  | 0     910B4       | OK           | 88.2   30   0 / 0              |
#                                       | 0   [Phy-ID]      | 0000:C1:00.0 | 0   0 / 0      26838/ 32768     |
_NAME = re.compile(r"^\|\s*(\d+)\s+(\S+)\s*\|\s*(\S+)\s*\|")
_CHIP = re.compile(r"^\|\s*\d+(?:\s+\d+)?\s*\|\s*[0-9A-Fa-f:.]+\s*\|.*\|\s*$")
_USAGE = re.compile(r"(\d+)\s*/\s*(\d+)")


@dataclass(frozen=True, slots=True)
class Seen:
    """One chip as the driver sees it. memory and free are bytes; HBM, or DDR on cards that have no HBM."""

    name: str
    health: str
    memory: int
    free: int


def driver_sees() -> tuple[Seen, ...] | None:
    """Every chip that `npu-smi info` lists, () when it fails, None when there is no npu-smi."""
    tool = shutil.which("npu-smi")
    if tool is None:
        return None
    try:
        done = subprocess.run([tool, "info"], capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse(done.stdout)


def parse(text: str) -> tuple[Seen, ...]:
    """The chips in the table of `npu-smi info`; one NPU may have two."""
    chips: list[Seen] = []
    name = None
    for line in text.splitlines():
        if "No running processes" in line or "Process id" in line:
            break
        if _CHIP.match(line) and name is not None:
            used, memory = max(
                ((int(a), int(b)) for a, b in _USAGE.findall(line)), key=lambda pair: pair[1], default=(0, 0)
            )
            chips.append(Seen(name[0], name[1], memory * MIB, (memory - used) * MIB))
            name = None
        elif match := _NAME.match(line):
            name = (match[2] if match[2].startswith("Ascend") else f"Ascend{match[2]}", match[3])
    return tuple(chips)
