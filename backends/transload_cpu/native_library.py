"""The native library: found, loaded through ctypes, and spoken to in its C types (native/transload_native.h)."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_uint32, c_void_p
from functools import cache
from pathlib import Path

import torch

from transload.errors import BackendError, ConfigError

LAYOUT_VERSION = 2
_INTERFACE_VERSION = 4  # of the structures below
ENABLE = "python -m transload_cpu.build_native"  # the one command that adds the kernels to an installed package

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PORTABLE, AVX2, AVX_VNNI, AVX512_VNNI, AMX_INT8, NEON_DOTPROD = range(6)

_OUT_OF_MEMORY = 5
_REASONS = {
    1: "the weight's sizes or types are not ones that the native kernels hold",
    2: "the packed weight is truncated, damaged, or of another version",
    3: "the arguments contradict each other",
    4: "this processor lacks the kernel's instructions",
}


class Geometry(ctypes.Structure):
    """tl_geometry: what a packed weight is."""

    _fields_ = (
        ("n", c_int64),
        ("k", c_int64),
        ("group_size", c_int64),
        ("experts", c_int64),
        ("bits", c_int32),
        ("zero", c_int32),
        ("midpoint", c_int32),
        ("scale_dtype", c_int32),
        ("act_order", c_int32),
        ("reserved", c_int32),
    )


class Product(ctypes.Structure):
    """tl_product: one call of matmul."""

    _fields_ = (
        ("packed", c_void_p),
        ("packed_bytes", c_int64),
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("m", c_int64),
        ("counts", c_void_p),
        ("bias", c_void_p),
        ("y", c_void_p),
        ("act_group", c_int64),
        ("act_bits", c_int32),
        ("x_dtype", c_int32),
        ("isa", c_int32),
        ("threads", c_int32),
    )


class Linear(ctypes.Structure):
    """tl_linear: a part of a decoder's linear layer."""

    _fields_ = (
        ("weight", c_void_p),
        ("weight_bytes", c_int64),
        ("n", c_int64),
        ("k", c_int64),
        ("experts", c_int64),
        ("bias", c_void_p),
        ("act_group", c_int64),
        ("act_bits", c_int32),
        ("float_dtype", c_int32),
    )


class Experts(ctypes.Structure):
    """tl_experts: how a token chooses among experts, and how many parts their linear layers have."""

    _fields_ = (
        ("experts", c_int64),
        ("top_k", c_int64),
        ("groups", c_int64),
        ("top_groups", c_int64),
        ("bias", c_void_p),
        ("scaling", c_float),
        ("sigmoid", c_int32),
        ("normalized", c_int32),
        ("router", c_int32),
        ("shared_gate", c_int32),
        ("gate_up", c_int32),
        ("down", c_int32),
    )


class DecoderLayer(ctypes.Structure):
    """tl_decoder_layer: norms, and how many parts each linear layer has."""

    _fields_ = (
        ("attention_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("after_attention", c_void_p),
        ("mlp_norm", c_void_p),
        ("after_mlp", c_void_p),
        ("window", c_int64),
        ("qkv", c_int32),
        ("out", c_int32),
        ("gate_up", c_int32),
        ("down", c_int32),
        ("experts", POINTER(Experts)),
    )


class DecoderShape(ctypes.Structure):
    """tl_decoder_shape: sizes and constants of a decoder."""

    _fields_ = (
        ("layers", c_int64),
        ("hidden", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("rotary", c_int64),
        ("eps", c_float),
        ("scaling", c_float),
        ("interleaved", c_int32),
        ("isa", c_int32),
        ("norm", c_void_p),
    )


class DecoderToken(ctypes.Structure):
    """tl_decoder_token: one call of a decoder's step."""

    _fields_ = (
        ("x", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_int64),
        ("length", c_int64),
        ("y", c_void_p),
        ("cache_dtype", c_int32),
        ("threads", c_int32),
    )


class DecoderPrompt(ctypes.Structure):
    """tl_decoder_prompt: several tokens in one call."""

    _fields_ = (
        ("x", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("capacity", c_int64),
        ("length", c_int64),
        ("count", c_int64),
        ("y", c_void_p),
        ("cache_dtype", c_int32),
        ("threads", c_int32),
    )


_SIGNATURES = {
    "tl_packed_bytes": (POINTER(Geometry), POINTER(c_int64)),
    "tl_pack": (POINTER(Geometry), c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int32),
    "tl_describe": (c_void_p, c_int64, POINTER(Geometry)),
    "tl_unpack": (c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int32),
    "tl_rows": (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_void_p),
    "tl_dequantize": (c_void_p, c_int64, c_int64, c_int64, c_int32, c_void_p, c_int32),
    "tl_matmul": (POINTER(Product),),
    "tl_float_product": (c_void_p, c_int32, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int32, c_int32),
    "tl_decoder_new": (POINTER(DecoderShape), c_void_p, c_void_p, c_int64, POINTER(c_void_p)),
    "tl_decoder_step": (c_void_p, POINTER(DecoderToken)),
    "tl_decoder_prompt_run": (c_void_p, POINTER(DecoderPrompt)),
    "tl_layout_version": (),
    "tl_interface_version": (),
}


@cache
def load(path: Path | None = None) -> ctypes.CDLL:
    """The library at `path`, by default where the build puts it. Raises BackendError when it is absent or broken."""
    from transload_cpu.build_native import LIBRARY  # here, so that running that module does not import it twice

    path = path or LIBRARY
    if not path.exists():
        raise BackendError(
            f"the native kernels are not built; '{ENABLE}' builds them where a C++ compiler is installed"
        )
    try:
        library = ctypes.CDLL(str(path))
    except OSError as e:
        raise BackendError(f"the native kernels do not load ({e}); '{ENABLE}' builds them anew") from e
    absent = [name for name in (*_SIGNATURES, "tl_supported", "tl_decoder_free") if not hasattr(library, name)]
    if absent:
        raise BackendError(f"the native kernels are of another version, without {absent[0]}; '{ENABLE}' renews them")
    for name, arguments in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int32
    library.tl_supported.argtypes, library.tl_supported.restype = (), c_uint32
    library.tl_decoder_free.argtypes, library.tl_decoder_free.restype = (c_void_p,), None
    versions = {"layout": LAYOUT_VERSION, "interface": _INTERFACE_VERSION}
    for what, expected in versions.items():
        found = getattr(library, f"tl_{what}_version")()
        if found != expected:
            raise BackendError(f"the native kernels have {what} {found}, expected {expected}; '{ENABLE}' renews them")
    return library


@cache
def unavailable() -> str | None:
    """None when the library is loaded; otherwise why not, and the command that would help."""
    try:
        load()
    except BackendError as e:
        return str(e)
    return None


@cache
def supported(isa: int) -> bool:
    """Whether this processor can run the kernels of an instruction set."""
    return unavailable() is None and bool(load().tl_supported() >> isa & 1)


def check(status: int, what: str) -> None:
    """Raises the error of a status that is not 0; `what` is what was asked, a noun."""
    if status == 0:
        return
    if status == _OUT_OF_MEMORY:
        raise BackendError(f"native {what}: out of memory")
    raise ConfigError(f"native {what}: {_REASONS.get(status, f'status {status}')}")
