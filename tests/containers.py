"""Small container files, valid and broken, built byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path

U8, I8, U32, F32, BOOL, STRING, ARRAY, U64 = 0, 1, 4, 6, 7, 8, 9, 10  # GGUF value types
GGML_F32, GGML_F16, GGML_Q4_0, GGML_Q4_K = 0, 1, 2, 12


def entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; header as an object or as bytes, length to lie about it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + payload


def array(element: int, count: int, payload: bytes) -> bytes:
    return struct.pack("<IQ", element, count) + payload


def record(name: str | bytes, ne: Sequence[int], kind: int, offset: int, dims: int | None = None) -> bytes:
    """A tensor record; ne in GGUF's order, fastest first."""
    return (
        string(name)
        + struct.pack("<I", len(ne) if dims is None else dims)
        + b"".join(struct.pack("<Q", n) for n in ne)
        + struct.pack("<IQ", kind, offset)
    )


def gguf(
    pairs: Sequence[bytes] = (),
    records: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
    alignment: int = 32,
) -> bytes:
    """A GGUF file; counts = (tensors, pairs) to lie about them."""
    tensors, metadata = counts or (len(records), len(pairs))
    head = magic + struct.pack("<IQQ", version, tensors, metadata) + b"".join(pairs) + b"".join(records)
    return head + b"\0" * (-len(head) % alignment) + data


def small_gguf() -> bytes:
    """Every kind of value, a block type and a float tensor."""
    pairs = [
        pair("general.architecture", STRING, string("llama")),
        pair("a.u8", U8, b"\x07"),
        pair("a.flag", BOOL, b"\x01"),
        pair("a.eps", F32, struct.pack("<f", 0.5)),
        pair("a.tokens", ARRAY, array(STRING, 3, string("a") + string("ü") + string(""))),
        pair("a.types", ARRAY, array(I8, 4, bytes([1, 255, 3, 4]))),
        pair("a.nested", ARRAY, array(ARRAY, 2, array(U8, 2, b"\x01\x02") + array(U8, 0, b""))),
    ]
    records = [record("w", (32, 2), GGML_Q4_0, 0), record("norm", (3,), GGML_F32, 64)]
    return gguf(pairs, records, bytes(range(36)) + bytes(28) + struct.pack("<3f", 1, 2, 3))


def small_safetensors() -> bytes:
    """Tensors of several widths, an empty one, a scalar, and metadata."""
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": entry("F32", [2, 3], 0, 24),
        "a.bias": entry("BF16", [2], 24, 28),
        "codes": entry("U8", [4], 28, 32),
        "nothing": entry("F16", [0, 5], 32, 32),
        "one": entry("I64", [], 32, 40),
    }
    return safetensors(header, bytes(range(40)))


def put(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
