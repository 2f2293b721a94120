"""Compiles the native kernels: `python -m transload_cpu.build_native`.

The same code runs when a wheel is built (the build hook loads this file by its path), so it needs nothing but the
standard library and a C++17 compiler: `c++`, or what the environment variable CXX names. No file is compiled for the
machine at hand: each instruction set has its own file with its own flags, and the library chooses at run time.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "native"
LIBRARY = Path(__file__).resolve().parent / "libtransload_native.so"

_COMMON = ("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-pthread")
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mprefer-vector-width=512"),
)
_EXACT = ("-ffp-contract=off",)  # every step rounds, as in torch: no multiplication is fused with an addition
_FLAGS = {
    "decoder_avx2.cpp": _AVX2,
    "decoder_avx512.cpp": _AVX512,
    "dequantize.cpp": _EXACT,
    "dequantize_avx512.cpp": (*_AVX512, *_EXACT),
    "kernel_avx2.cpp": _AVX2,
    "kernel_avx_vnni.cpp": (*_AVX2, "-mavxvnni"),
    "kernel_avx512.cpp": _AVX512,
    "kernel_avx512_bf16.cpp": (*_AVX512, "-mavx512bf16"),
    "kernel_amx.cpp": (*_AVX512, "-mamx-tile", "-mamx-int8"),
    "kernel_dotprod.cpp": ("-march=armv8.2-a+dotprod",),
}
_MACHINES = {
    "x86_64": (
        "decoder_avx2.cpp",
        "decoder_avx512.cpp",
        "dequantize_avx512.cpp",
        "kernel_avx2.cpp",
        "kernel_avx_vnni.cpp",
        "kernel_avx512.cpp",
        "kernel_avx512_bf16.cpp",
        "kernel_amx.cpp",
    ),
    "aarch64": ("kernel_dotprod.cpp",),
}


class BuildFailed(Exception):
    """The library cannot be built here; the message says why and what would help."""


def build(output: Path = LIBRARY, extra: tuple[str, ...] = (), machine: str | None = None) -> Path:
    """Compiles the library to `output`, replacing it only when all went well, and returns the path.

    extra: flags for every file and the link (sanitizers). machine: the target of a cross compiler named by CXX.
    Raises BuildFailed when there is no compiler, or with the compiler's words.
    """
    compiler = _compiler()
    machine = machine or platform.machine().replace("AMD64", "x86_64").replace("arm64", "aarch64")
    special = {name for names in _MACHINES.values() for name in names}
    names = [p.name for p in sorted(SOURCES.glob("*.cpp")) if p.name not in special]
    names += _MACHINES.get(machine, ())
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{name}.o" for name in names]
        commands = [
            [*compiler, *_COMMON, *_FLAGS.get(name, ()), *extra, "-c", str(SOURCES / name), "-o", str(out)]
            for name, out in zip(names, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        built = output.with_name(f".{output.name}.{os.getpid()}")
        _run(
            [*compiler, "-shared", "-pthread", *_static_runtime(compiler), *extra, *map(str, objects), "-o", str(built)]
        )
    built.replace(output)
    return output


def _compiler() -> list[str]:
    named = os.environ.get("CXX", "").split() or [next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "")]
    if not named[0] or shutil.which(named[0]) is None:
        raise BuildFailed(f"no C++ compiler found ({named[0] or 'c++, g++, clang++'}); install one or set CXX")
    return named


def _static_runtime(compiler: list[str]) -> list[str]:
    """Flags that put the C++ runtime inside, so that the library also loads where an older one is installed."""
    return [] if "clang" in compiler[0] or sys.platform == "darwin" else ["-static-libstdc++", "-static-libgcc"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-3:]
        raise BuildFailed(f"{' '.join(command[:1])} failed on {command[-3]}: {' '.join(lines[:3]) or 'no message'}")


def main() -> int:
    """Builds in place and says where."""
    try:
        path = build()
    except (BuildFailed, OSError) as e:
        print(f"native kernels not built: {e}", file=sys.stderr)
        return 1
    print(f"native kernels built: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
