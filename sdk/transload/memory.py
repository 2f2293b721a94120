"""How much memory this process has taken, for reports."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_memory() -> int:
    """The most memory this process has had, in bytes; 0 where the system does not tell.

    On Linux from /proc: what getrusage says begins with the peak of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = (line.split() for line in status.read_text().splitlines())
        return next((int(line[1]) * 1024 for line in lines if line and line[0] == "VmHWM:"), 0)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
