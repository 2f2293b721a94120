"""Which NVIDIA GPUs are here, and when torch cannot use them, why not.

torch answers for what can be used; nvidia-smi, which needs only the driver, answers for what is there. It also gives
the free memory: torch's own answer would first create a context of several hundred megabytes on every GPU.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from transload.errors import BackendError
from transload.hal import Device

QUERY = "uuid,name,memory.total,memory.free"  # MiB each, one line a GPU
MIB = 1 << 20
SECONDS = 20  # nvidia-smi answers within one; a wedged driver never does


@dataclass(frozen=True, slots=True)
class Seen:
    """A GPU as the driver sees it. memory and free are bytes; None where the driver does not say (unified memory)."""

    uuid: str
    name: str
    memory: int | None
    free: int | None


def missing() -> str | None:
    """None when torch can use at least one GPU; otherwise the first thing that is missing, and the remedy."""
    if torch.version.cuda is not None and torch.cuda.is_available() and torch.cuda.device_count() > 0:
        return None
    seen = driver_sees()
    if seen is None:
        return "no NVIDIA driver: nvidia-smi is not on the path; install it, or start the container with --gpus all"
    if not seen:
        return "nvidia-smi lists no GPU; run nvidia-smi to see why"
    gpus = f"{len(seen)} x {seen[0].name}"
    if torch.version.cuda is None:
        return (
            f"{gpus} here, but torch {torch.__version__} is not a CUDA build; install torch's CUDA build (pytorch.org)"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and (visible.strip() in ("", "-1", "NoDevFiles")):
        return f"{gpus} here, but CUDA_VISIBLE_DEVICES={visible!r} hides them; unset it"
    return f"{gpus} here, but torch {torch.__version__} cannot use them: {_torch_error()}"


def devices() -> tuple[Device, ...]:
    """The GPUs that torch can use, in torch's order; empty when there are none."""
    if missing() is not None:
        return ()
    seen = {gpu.uuid: gpu for gpu in driver_sees() or ()}
    return tuple(_device(index, seen) for index in range(torch.cuda.device_count()))


def _device(index: int, seen: dict[str, Seen]) -> Device:
    facts = torch.cuda.get_device_properties(index)
    gpu = seen.get(f"GPU-{facts.uuid}")
    free = gpu.free if gpu and gpu.free is not None else torch.cuda.mem_get_info(index)[0]
    return Device("cuda", index, facts.name, f"sm_{facts.major}{facts.minor}", int(facts.total_memory), int(free))


def arch_number(arch: str) -> int:
    """Compute capability times ten of "sm_90"; 0 for anything else.

    >>> arch_number("sm_121")
    121
    """
    digits = arch.removeprefix("sm_").rstrip("af")
    return int(digits) if digits.isdigit() else 0


@contextmanager
def on_device(kernel: str, what: str) -> Iterator[None]:
    """Turns the GPU's out-of-memory error into a BackendError that names the kernel and the request."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        raise BackendError(f"kernel '{kernel}': the GPU has no room for {what}: {str(e).splitlines()[0]}") from e


def driver_sees() -> tuple[Seen, ...] | None:
    """Every GPU that nvidia-smi lists, () when it fails, None when there is no nvidia-smi."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return parse(done.stdout) if done.returncode == 0 else ()


def parse(text: str) -> tuple[Seen, ...]:
    """The lines of nvidia-smi's csv answer; lines of another shape are passed over.

    >>> parse("GPU-5a1b, NVIDIA H200, 143771, 143240")
    (Seen(uuid='GPU-5a1b', name='NVIDIA H200', memory=150754820096, free=150198026240),)
    """
    rows = [[field.strip() for field in line.split(",")] for line in text.splitlines()]
    return tuple(Seen(row[0], row[1], _bytes(row[2]), _bytes(row[3])) for row in rows if len(row) == 4)


def _bytes(mib: str) -> int | None:
    return int(mib) * MIB if mib.isdigit() else None


def _torch_error() -> str:
    """Torch's own first line on why CUDA does not start."""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except Exception as e:
        return str(e).splitlines()[0] if str(e) else type(e).__name__
    return "it sees no device; check CUDA_VISIBLE_DEVICES and that the driver is recent enough"
