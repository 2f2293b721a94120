"""Build hook: compiles the native CPU kernels into the wheel when there is a C++ compiler.

With them the wheel is tagged for this platform (any Python 3: the library is loaded through ctypes); without a compiler
it is pure, installs everywhere, and `transload devices` says how to add the kernels later. The environment variable
TRANSLOAD_NATIVE=0 skips the build, =1 makes a failed build an error.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_BACKEND = "backends/transload_cpu"


class NativeKernelsHook(BuildHookInterface):  # type: ignore[type-arg,misc]
    """Runs before a wheel is packed, also for an editable install."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Builds the library beside its Python module and adds it to the wheel."""
        wanted = os.environ.get("TRANSLOAD_NATIVE", "")
        builder = _load(Path(self.root) / _BACKEND / "build_native.py")
        library = builder.LIBRARY
        if wanted == "0":
            self.app.display_info("native kernels: skipped, TRANSLOAD_NATIVE=0")
            return
        try:
            builder.build()
        except (builder.BuildFailed, OSError) as e:
            if wanted == "1":
                raise
            self.app.display_warning(f"native kernels: not built, the package works without them: {e}")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform()}"
        build_data["artifacts"].append(f"/{_BACKEND}/{library.name}")


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("transload_build_native", path)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _platform() -> str:
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")
