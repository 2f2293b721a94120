"""Which Ascend NPUs are here, and when torch cannot use them, why not.

What is missing is found out in the order in which it must be installed: driver, CANN, torch_npu. torch_npu is imported
only when everything below it is in place: without CANN its import fails, and where torch loads it by itself (its
autoload) `import torch` fails with it.
"""

from __future__ import annotations

import ctypes.util
import importlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from transload.hal import Device
from transload_ascend.npu_smi import driver_sees

ROOT = Path("/")
LIBRARY = "libascendcl.so"  # the part of CANN that torch_npu links first
# Where CANN's installer puts itself: the community image and root installs, then a user's own.
TOOLKITS = ("usr/local/Ascend/cann", "usr/local/Ascend/ascend-toolkit", "root/Ascend/ascend-toolkit")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is installed, found out without importing torch_npu."""

    npu_smi: bool  # the driver's tool is on the path
    device_files: int  # /dev/davinci0, 1, ...
    torch: str
    torch_npu: str | None  # its version
    cann_on_path: bool  # its libraries can be loaded
    cann_script: Path | None  # the script that puts them on the path, where CANN is installed


def gather(root: Path = ROOT, environ: Mapping[str, str] = os.environ) -> Facts:
    """Looks at this machine; `root` is where /dev and /usr are looked for."""
    try:
        torch_npu = metadata.version("torch-npu")
    except metadata.PackageNotFoundError:
        torch_npu = None
    scripts = [root / folder / "set_env.sh" for folder in TOOLKITS]
    return Facts(
        npu_smi=shutil.which("npu-smi") is not None,
        device_files=len(list((root / "dev").glob("davinci[0-9]*"))),
        torch=str(torch.__version__),
        torch_npu=torch_npu,
        cann_on_path=_library_found(environ),
        cann_script=next((script for script in scripts if script.is_file()), None),
    )


def reason(facts: Facts) -> str | None:
    """The first thing that is missing below torch_npu, and the remedy; None when it may be imported."""
    if not facts.device_files and not facts.npu_smi:
        return "no Ascend driver: npu-smi is not on the path and there is no /dev/davinci0; install driver and firmware"
    if not facts.device_files:
        return "npu-smi is here, but no /dev/davinci0; start the container with --device=/dev/davinci0 (one per NPU)"
    here = _shown(facts)
    if not facts.cann_on_path and facts.cann_script:
        return f"{here} here, but CANN's libraries are not on the path; run: source {facts.cann_script}"
    if not facts.cann_on_path:
        return (
            f"{here} here, but CANN is not installed ({LIBRARY} not found); install its toolkit and source set_env.sh"
        )
    release = ".".join(facts.torch.split(".")[:2])
    if facts.torch_npu is None:
        return f"{here} here, but torch_npu is not installed; run: pip install torch-npu=={release}.*"
    if ".".join(facts.torch_npu.split(".")[:2]) != release:
        return (
            f"{here} here, but torch_npu {facts.torch_npu} does not fit torch {facts.torch}; "
            f"run: pip install torch-npu=={release}.*"
        )
    return None


def _shown(facts: Facts) -> str:
    """The NPUs for a message: npu-smi knows their names, and takes seconds, so that it runs only for a message."""
    chips = driver_sees()
    return f"{len(chips)} x {chips[0].name}" if chips else f"{facts.device_files} NPUs"


def missing() -> str | None:
    """None when torch can use at least one NPU; otherwise the first thing that is missing, and the remedy."""
    found = reason(gather())
    if found is not None:
        return found
    try:
        npu = _npu()
        count = npu.device_count() if npu.is_available() else 0
    except Exception as e:  # the vendor's loader raises ImportError, RuntimeError and its own types
        return f"torch_npu does not start: {str(e).splitlines()[0] if str(e) else type(e).__name__}"
    if count == 0:
        visible = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
        shown = "" if visible is None else f" (ASCEND_RT_VISIBLE_DEVICES={visible!r})"
        return f"torch_npu sees no NPU{shown}; run npu-smi info to see their health"
    return None


def devices() -> tuple[Device, ...]:
    """The NPUs that torch can use, in torch's order; empty when there are none."""
    if missing() is not None:
        return ()
    npu = _npu()
    return tuple(_device(npu, index) for index in range(npu.device_count()))


def family(model: str) -> str:
    """The family that decides what the operators can do: 910B, 910C, 310P, 950; the name itself where unknown.

    >>> family("Ascend910B3"), family("Ascend910_9391"), family("Ascend310P3")
    ('910B', '910C', '310P')
    """
    short = model.strip().removeprefix("Ascend").strip().upper()
    starts = (("910_93", "910C"), ("910C", "910C"), ("910B", "910B"), ("310P", "310P"), ("95", "950"))
    return next((name for start, name in starts if short.startswith(start)), short)


def _device(npu: Any, index: int) -> Device:
    facts = npu.get_device_properties(index)
    free, _ = npu.mem_get_info(index)
    return Device("ascend", index, facts.name, family(facts.name), int(facts.total_memory), int(free))


def _npu() -> Any:
    """torch.npu, which exists once torch_npu has been imported."""
    importlib.import_module("torch_npu")
    return torch.npu  # type: ignore[attr-defined]


def _library_found(environ: Mapping[str, str]) -> bool:
    folders = [Path(folder) for folder in environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    return any((folder / LIBRARY).exists() for folder in folders) or ctypes.util.find_library("ascendcl") is not None
