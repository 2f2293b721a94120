"""safetensors headers: what is read equals the library's reading, and every lie is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from containers import entry, put, safetensors, small_safetensors
from transload.errors import FormatError
from transload.headers import DTYPE_BITS, read_safetensors_header
from transload.headers.safetensors import MAX_HEADER

ONE = {"a": entry("U8", [4], 0, 4)}


def two(first: dict[str, object], second: dict[str, object]) -> dict[str, object]:
    return {"a": first, "b": second}


BROKEN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty file": (b"", ("0 bytes", "too short")),
    "seven bytes": (b"\0" * 7, ("7 bytes", "too short")),
    "header beyond the file": (safetensors(ONE, b"1234", length=5000), ("header of 5000 bytes", "truncated")),
    "header beyond the limit": (
        safetensors(ONE, b"1234", length=2**63),
        (f"header of {2**63} bytes", f"allows {MAX_HEADER}"),
    ),
    "not JSON": (safetensors(b'{"a":'), ("header", "not valid JSON")),
    "not an object": (safetensors(b"[1]"), ("starts with b'['", "not a safetensors file")),
    "an HTML page": (b"<!DOCTYPE html><html>Sign in</html>", ("header of",)),
    "not UTF-8": (safetensors(b'{"\xff":1}'), ("not UTF-8", "0xff")),
    "deep nesting": (safetensors(b'{"a":' + b"[" * 9000 + b"]" * 9000 + b"}"), ("nested too deeply",)),
    "many brackets": (safetensors(b'{"a":[' + b"[]," * 30000 + b"[]]}"), ("tensor 'a'", "is '[[], []")),
    "huge number": (safetensors(b'{"a":' + b"9" * 5000 + b"}"), ("not valid JSON",)),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}}), ("__metadata__", "object of strings")),
    "entry is a list": (safetensors({"a": []}), ("tensor 'a'", "is '[]'", "dtype, shape and data_offsets")),
    "field missing": (safetensors({"a": {"dtype": "U8", "shape": [1]}}), ("tensor 'a'", "data_offsets")),
    "field too many": (safetensors({"a": {**entry("U8", [0], 0, 0), "x": 1}}), ("tensor 'a'", "'x'")),
    "unknown dtype": (safetensors({"a": entry("Q4_K", [4], 0, 4)}, b"1234"), ("unknown dtype 'Q4_K'", "BF16")),
    "dtype is a list": (safetensors({"a": {**ONE["a"], "dtype": []}}, b"1234"), ("unknown dtype '[]'",)),
    "negative dimension": (safetensors({"a": entry("U8", [-4], 0, 4)}, b"1234"), ("shape '[-4]'",)),
    "boolean dimension": (safetensors({"a": entry("U8", [True], 0, 1)}, b"1"), ("shape '[True]'",)),
    "float dimension": (safetensors({"a": entry("U8", [4.0], 0, 4)}, b"1234"), ("shape '[4.0]'",)),
    "dimension of 2**63": (safetensors({"a": entry("U8", [2**63, 0], 0, 0)}), ("2**63 - 1",)),
    "too many dimensions": (
        safetensors({"a": entry("U8", [1] * 65, 0, 1)}, b"1"),
        ("at most 64", "..."),
    ),
    "shape is a number": (safetensors({"a": {**ONE["a"], "shape": 4}}, b"1234"), ("shape '4'",)),
    "offsets reversed": (safetensors({"a": entry("U8", [4], 4, 0)}, b"1234"), ("data_offsets '[4, 0]'",)),
    "one offset": (safetensors({"a": {**ONE["a"], "data_offsets": [4]}}, b"1234"), ("data_offsets '[4]'",)),
    "size against shape": (safetensors({"a": entry("F32", [4], 0, 4)}, b"1234"), ("has 4 bytes", "needs 16")),
    "half a byte": (safetensors({"a": entry("F4", [3], 0, 1)}, b"1"), ("F4", "whole bytes")),
    "beyond the file": (safetensors(ONE, b"123"), ("tensor 'a'", "truncated", "but the file has")),
    "overlap": (
        safetensors(two(entry("U8", [4], 0, 4), entry("U8", [4], 2, 6)), b"123456"),
        ("tensor 'b' overlaps 'a' by 2 bytes",),
    ),
    "same bytes twice": (
        safetensors(two(entry("U8", [4], 0, 4), entry("U8", [4], 0, 4)), b"1234"),
        ("overlaps",),
    ),
    "hole": (
        safetensors(two(entry("U8", [2], 0, 2), entry("U8", [2], 4, 6)), b"123456"),
        ("2 bytes between 'a' and 'b'",),
    ),
    "hole before the first": (safetensors({"a": entry("U8", [2], 2, 4)}, b"1234"), ("between 'the header' and 'a'",)),
    "bytes after the last": (safetensors(ONE, b"12345678"), ("4 bytes after 'a'",)),
    "name twice": (
        safetensors(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"12",
        ),
        ("'a' occurs twice",),
    ),
    "name twice, once escaped": (
        safetensors(
            b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},'
            b'"\\u0061":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
        ),
        ("'a' occurs twice",),
    ),
    "field twice": (
        safetensors(b'{"a":{"dtype":"U8","dtype":"I8","shape":[0],"data_offsets":[0,0]}}'),
        ("'dtype' occurs twice",),
    ),
    "lone surrogate": (
        safetensors(b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'),
        ("not valid Unicode",),
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    data, words = BROKEN[case]
    path = put(tmp_path / "broken.safetensors", data)
    with pytest.raises(FormatError) as e:
        read_safetensors_header(path)
    message = str(e.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    assert len(message) < 600 + len(str(path))
    for word in words:
        assert word in message


def test_a_valid_header_is_read_whole(tmp_path: Path) -> None:
    path = put(tmp_path / "a.safetensors", small_safetensors())
    infos, metadata = read_safetensors_header(path)
    assert metadata == {"format": "pt"}
    assert [(i.name, i.dtype, i.shape, i.nbytes) for i in infos.values()] == [
        ("a.weight", "F32", (2, 3), 24),
        ("a.bias", "BF16", (2,), 4),
        ("codes", "U8", (4,), 4),
        ("nothing", "F16", (0, 5), 0),
        ("one", "I64", (), 8),
    ]
    assert path.read_bytes()[infos["codes"].start : infos["codes"].end] == bytes(range(28, 32))


def test_headers_agree_with_the_library_for_every_dtype_that_torch_has(tmp_path: Path) -> None:
    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16]
    dtypes += [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
    tensors = {f"t{i}": torch.ones(i + 1, 3).to(d) for i, d in enumerate(dtypes)}
    tensors["f4"] = torch.zeros(3, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"who": "library"})
    infos, metadata = read_safetensors_header(tmp_path / "a.safetensors")
    assert metadata == {"who": "library"}
    with safe_open(tmp_path / "a.safetensors", "pt") as f:
        assert sorted(infos) == sorted(f.keys())
        for name, info in infos.items():
            view = f.get_slice(name)
            assert (info.dtype, info.shape) == (view.get_dtype(), tuple(view.get_shape()))
            assert DTYPE_BITS[info.dtype] * int(torch.Size(info.shape).numel()) == info.nbytes * 8


def test_what_the_library_refuses_is_refused_here_too(tmp_path: Path) -> None:
    accepted = []
    for case, (data, _) in BROKEN.items():
        try:
            with safe_open(put(tmp_path / "a.safetensors", data), "pt"):
                accepted.append(case)
        except Exception:
            continue
    # The library lets these pass: shapes are sound there, and a key that comes twice is taken once.
    assert set(accepted) == {"too many dimensions", "dimension of 2**63", "name twice, once escaped", "field too many"}


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"gone\.safetensors: cannot be read: No such file"):
        read_safetensors_header(tmp_path / "gone.safetensors")
