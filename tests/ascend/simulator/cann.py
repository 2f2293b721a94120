"""Stub CANN libraries: enough for the real torch_npu to be imported on a machine without CANN, and nothing more.

torch_npu is linked against CANN's libraries with BIND_NOW, so every C function that it names must exist before it can
be loaded. The names are read from the wheel itself: undefined, unmangled, without a library version, and defined
neither by the wheel nor by torch. A stub answers with an error code. No device exists and no device arithmetic runs:
what the stubs make reachable are torch_npu's own schemas and meta kernels.
"""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

# The libraries that torch_npu 2.13.0 names in its DT_NEEDED entries and that come from CANN. All stubs live in the
# first one; the others only have to exist.
LIBRARIES = ("ascendcl", "hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel")

# ACL_ERROR_INTERNAL_ERROR, for everything that has no better answer.
FAILED = 507000

# Functions whose answer is looked at before a device is used. Returning an error for all of them crashes
# torch_npu: it reads the out parameters, or keeps the pointer.
ANSWERS = {
    "aclInit": "int aclInit(const char *c) { (void)c; return 507008; }",  # no device driver
    "aclFinalize": "int aclFinalize(void) { return 0; }",
    "aclrtGetDevice": "int aclrtGetDevice(int *d) { if (d) *d = 0; return 107002; }",  # no context
    "aclrtGetDeviceCount": "int aclrtGetDeviceCount(unsigned *c) { if (c) *c = 0; return 0; }",
    "aclrtGetSocName": 'const char *aclrtGetSocName(void) { return "Ascend910B3"; }',
    "aclGetRecentErrMsg": 'const char *aclGetRecentErrMsg(void) { return "stub: no CANN"; }',
    "MsprofRegisterCallback": "int MsprofRegisterCallback(void) { return 0; }",
    "MsprofGetHashId": "unsigned long long MsprofGetHashId(void) { return 0; }",
    "MsprofSysCycleTime": "unsigned long long MsprofSysCycleTime(void) { return 0; }",
    "aclCreateDataBuffer": "void *aclCreateDataBuffer(void) { return NULL; }",
    "aclCreateTensorDesc": "void *aclCreateTensorDesc(void) { return NULL; }",
    "aclopCreateAttr": "void *aclopCreateAttr(void) { return NULL; }",
}


def build(torch_npu: Path, torch: Path, into: Path) -> Path:
    """Compiles the stubs that the wheel unpacked at `torch_npu` needs beside the torch package at `torch`.

    Needs gcc and nm. Returns `into`, the folder for LD_LIBRARY_PATH.
    """
    into.mkdir(parents=True, exist_ok=True)
    names = missing_symbols(torch_npu, torch)
    body = [ANSWERS.get(name, f"int {name}(void) {{ return {FAILED}; }}") for name in names]
    source = into / "stubs.c"
    source.write_text("#include <stddef.h>\n" + "\n".join(body) + "\n", encoding="utf-8")
    empty = into / "empty.c"
    empty.write_text("int transload_empty_stub;\n", encoding="utf-8")
    for library in LIBRARIES:
        code = source if library == LIBRARIES[0] else empty
        soname = f"lib{library}.so"
        command = ["gcc", "-shared", "-fPIC", "-o", str(into / soname), str(code), f"-Wl,-soname,{soname}"]
        subprocess.run(command, check=True)
    return into


def missing_symbols(torch_npu: Path, torch: Path) -> list[str]:
    """Names of the C functions that CANN would have to provide."""
    wheel = [*torch_npu.glob("torch_npu/lib/lib*.so"), *torch_npu.glob("torch_npu/_C.*.so")]
    wheel = [path for path in wheel if path.name != "libop_plugin_atb.so"]  # optional, loaded on demand
    needed = _symbols(wheel, "--undefined-only")
    have = _symbols([*wheel, *torch.glob("lib/lib*.so*")], "--defined-only")
    process = ctypes.CDLL(None)  # the interpreter with libc: what is found there needs no stub
    return sorted(n for n in needed - have if "@" not in n and not n.startswith("_Z") and not hasattr(process, n))


def _symbols(libraries: list[Path], which: str) -> set[str]:
    """Symbols of shared libraries by nm, weak undefined ones left out."""
    command = ["nm", "-D", which, *map(str, libraries)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    fields = [line.split() for line in lines if line and not line.endswith(":")]
    return {f[-1] for f in fields if len(f) >= 2 and f[-2] not in ("w", "v")}
