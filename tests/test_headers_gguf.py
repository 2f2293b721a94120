"""GGUF headers: what is read equals the gguf package's reading, and every lie is named."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf as package
import numpy as np
import pytest

from containers import (
    ARRAY,
    BOOL,
    GGML_F32,
    GGML_Q4_0,
    GGML_Q4_K,
    STRING,
    U8,
    U32,
    array,
    gguf,
    pair,
    put,
    record,
    small_gguf,
    string,
)
from transload.errors import FormatError
from transload.headers import read_gguf_header
from transload.source import open_source

F4 = record("w", (4,), GGML_F32, 0)
DATA = bytes(16)


def nested(depth: int) -> bytes:
    return array(U8, 1, b"\x01") if depth == 0 else array(ARRAY, 1, nested(depth - 1))


BROKEN: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty file": (b"", ("starts with b''", "not a GGUF file")),
    "other magic": (gguf(magic=b"GGML"), ("starts with b'GGML'", "not a GGUF file")),
    "cut in the counts": (gguf()[:20], ("20 bytes", "truncated")),
    "version 1": (gguf(version=1), ("GGUF version 1", "2 and 3 are read")),
    "version 4": (gguf(version=4), ("GGUF version 4",)),
    "big-endian": (gguf(version=0x03000000), ("big-endian", "convert")),
    "huge tensor count": (gguf(counts=(2**63, 0)), (f"claims {2**63} tensors",)),
    "huge pair count": (gguf(counts=(0, 2**63)), (f"claims {2**63} metadata pairs",)),
    "one pair too many": (gguf([pair("a", U8, b"\1")], counts=(0, 3)), ("metadata ''", "occurs twice")),
    "huge key": (gguf([struct.pack("<Q", 2**62) + b"aaaaaaaaa"]), ("a metadata key", "truncated")),
    "key not UTF-8": (gguf([pair(b"\xff", U8, b"\1")]), ("a metadata key", "not UTF-8")),
    "key twice": (gguf([pair("a", U8, b"\1")] * 2), ("metadata 'a'", "occurs twice")),
    "unknown value type": (gguf([pair("a", 13, b"\1")]), ("metadata 'a'", "unknown value type 13")),
    "unknown element type": (gguf([pair("a", ARRAY, array(13, 1, b"\1"))]), ("metadata 'a'", "unknown value type 13")),
    "huge string": (gguf([pair("a", STRING, struct.pack("<Q", 2**63))]), ("metadata 'a'", "outside the file")),
    "huge array": (gguf([pair("a", ARRAY, array(U32, 2**62, b""))]), ("metadata 'a'", f"claims {2**62} array")),
    "huge array of strings": (gguf([pair("a", ARRAY, array(STRING, 2**60, b""))]), ("metadata 'a'", "claims")),
    "string array cut": (
        gguf([pair("a", ARRAY, array(STRING, 3, string("x") + struct.pack("<Q", 10**6) + bytes(64)))]),
        ("metadata 'a'", "of 3 lies outside the file"),
    ),
    "nested too deeply": (gguf([pair("a", ARRAY, nested(9))]), ("metadata 'a'", "nested deeper")),
    "alignment of 0": (gguf([pair("general.alignment", U32, struct.pack("<I", 0))]), ("general.alignment is '0'",)),
    "alignment of 48": (gguf([pair("general.alignment", U32, struct.pack("<I", 48))]), ("power of two",)),
    "alignment is a string": (gguf([pair("general.alignment", STRING, string("32"))]), ("general.alignment",)),
    "five dimensions": (gguf([], [record("w", (1,) * 5, GGML_F32, 0)], DATA), ("tensor 'w'", "5 dimensions")),
    "huge dimension count": (gguf([], [record("w", (), 0, 0, dims=2**32 - 1)]), ("tensor 'w'", "at most 4")),
    "unknown tensor type": (gguf([], [record("w", (4,), 4, 0)], DATA), ("tensor 'w'", "unknown ggml type 4")),
    "rows without whole blocks": (
        gguf([], [record("w", (48, 2), GGML_Q4_0, 0)], bytes(64)),
        ("tensor 'w'", "rows of 48 values", "Q4_0 comes in blocks of 32"),
    ),
    "scalar of a block type": (gguf([], [record("w", (), GGML_Q4_0, 0)], bytes(64)), ("rows of 1 values",)),
    "dimension of 2**63": (gguf([], [record("w", (2**63,), GGML_F32, 0)]), ("tensor 'w'", "2**63 - 1")),
    "product beyond 64 bits": (gguf([], [record("w", (2**62,) * 4, GGML_F32, 0)]), ("tensor 'w'", "truncated")),
    "offset off the alignment": (gguf([], [record("w", (4,), GGML_F32, 8)], bytes(64)), ("offset 8", "alignment 32")),
    "offset beyond the file": (gguf([], [record("w", (4,), GGML_F32, 2**63)], DATA), ("tensor 'w'", "truncated")),
    "data cut": (gguf([], [F4], bytes(15)), ("tensor 'w': ends at byte", "truncated")),
    "name twice": (gguf([], [F4, record("w", (4,), GGML_F32, 32)], bytes(64)), ("tensor 'w'", "occurs twice")),
    "overlap": (
        gguf([], [record("w", (12,), GGML_F32, 0), record("v", (4,), GGML_F32, 32)], bytes(64)),
        ("tensor 'v' overlaps 'w'",),
    ),
    "name not UTF-8": (gguf([], [record(b"\xff\xfe", (4,), GGML_F32, 0)], DATA), ("a tensor's name", "not UTF-8")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_refused_by_name(tmp_path: Path, case: str) -> None:
    data, words = BROKEN[case]
    path = put(tmp_path / "broken.gguf", data)
    with pytest.raises(FormatError) as e:
        read_gguf_header(path)
    message = str(e.value)
    assert message.startswith(str(path))
    assert message.isprintable()
    for word in words:
        assert word in message


def test_values_of_every_kind_are_decoded_when_asked(tmp_path: Path) -> None:
    header = read_gguf_header(put(tmp_path / "a.gguf", small_gguf()))
    assert dict(header.metadata) == {
        "general.architecture": "llama",
        "a.u8": 7,
        "a.flag": True,
        "a.eps": 0.5,
        "a.tokens": ["a", "ü", ""],
        "a.types": [1, -1, 3, 4],
        "a.nested": [[1, 2], []],
    }
    assert header.metadata.count("a.tokens") == 3
    assert header.metadata.get("absent", 5) == 5
    with pytest.raises(FormatError, match="no array"):
        header.metadata.count("a.u8")


def test_tensors_have_torch_order_and_file_offsets(tmp_path: Path) -> None:
    header = read_gguf_header(put(tmp_path / "a.gguf", small_gguf()))
    w, norm = header.tensors["w"], header.tensors["norm"]
    assert (w.dtype, w.shape, w.nbytes, w.start) == ("Q4_0", (2, 32), 36, header.data_start)
    assert (norm.dtype, norm.shape, norm.start) == ("F32", (3,), header.data_start + 64)
    assert header.data_start % header.alignment == 0


def test_bad_text_is_found_when_it_is_decoded_not_before(tmp_path: Path) -> None:
    strings = array(STRING, 2, string("good") + string(b"\xff"))
    header = read_gguf_header(put(tmp_path / "a.gguf", gguf([pair("k", ARRAY, strings), pair("b", BOOL, b"\x05")])))
    with pytest.raises(FormatError, match=r"metadata 'k'.*not UTF-8"):
        header.metadata["k"]
    with pytest.raises(FormatError, match=r"metadata 'b'.*boolean is stored as 5"):
        header.metadata["b"]


@pytest.mark.parametrize("alignment", [32, 64])
def test_headers_agree_with_the_gguf_package(tmp_path: Path, alignment: int) -> None:
    path = tmp_path / "a.gguf"
    writer = package.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    writer.add_uint32("llama.block_count", 3)
    writer.add_int64("x.i64", -5)
    writer.add_uint64("x.u64", 2**63)
    writer.add_float64("x.f64", 1e300)
    writer.add_token_list(["<s>", "é", "▁the"])
    writer.add_token_scores([0.0, -1.0, -2.5])
    weights = np.arange(3 * 256, dtype=np.float32).reshape(3, 256) / 99
    writer.add_tensor("q4_0", package.quantize(weights, package.GGMLQuantizationType.Q4_0), raw_dtype=GGML_Q4_0)
    writer.add_tensor("f32", weights)
    writer.add_tensor("f16", weights[:1].astype(np.float16))
    writer.add_tensor("q8", package.quantize(weights, package.GGMLQuantizationType.Q8_0), raw_dtype=8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_gguf_header(path), package.GGUFReader(path)
    assert ours.alignment == theirs.alignment == alignment
    for key, value in ours.metadata.items():
        assert value == theirs.fields[key].contents(), key
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert info.dtype == tensor.tensor_type.name
        assert info.shape == tuple(int(n) for n in reversed(tensor.shape))
        assert (info.start, info.nbytes) == (tensor.data_offset, tensor.n_bytes)


def test_every_block_type_of_the_package_has_its_size(tmp_path: Path) -> None:
    for kind, (block, nbytes) in package.GGML_QUANT_SIZES.items():
        data = gguf([], [record("w", (block * 2, 3), int(kind), 0)], bytes(nbytes * 6))
        info = read_gguf_header(put(tmp_path / "a.gguf", data)).tensors["w"]
        assert (info.dtype, info.shape, info.nbytes) == (kind.name, (3, block * 2), nbytes * 6)
    assert package.GGML_QUANT_SIZES[package.GGMLQuantizationType(GGML_Q4_K)] == (256, 144)


def part(number: int, count: int, name: str) -> bytes:
    pairs = [pair("split.no", 2, struct.pack("<H", number)), pair("split.count", 2, struct.pack("<H", count))]
    return gguf(pairs, [record(name, (4,), GGML_F32, 0)], struct.pack("<4f", *[number] * 4))


def test_a_split_model_is_read_from_its_first_part(tmp_path: Path) -> None:
    paths = [put(tmp_path / f"m-{i + 1:05d}-of-00003.gguf", part(i, 3, f"t{i}")) for i in range(3)]
    for place in (paths[0], tmp_path):
        source = open_source(place)
        assert {name: info.file for name, info in source.infos.items()} == dict(
            zip(("t0", "t1", "t2"), paths, strict=True)
        )
        assert source.read("t2").tolist() == [2.0] * 4
    with pytest.raises(FormatError, match=r"m-00002-of-00003\.gguf: is part 2 of 3; give the first, m-00001-of-00003"):
        read_gguf_header(paths[1])


SPLITS = {
    "part missing": ({0: part(0, 2, "a")}, "m-00002-of-00002.gguf: cannot be read: No such file"),
    "tensor in two parts": ({0: part(0, 2, "a"), 1: part(1, 2, "a")}, "tensor 'a' is also in m-00001-of-00002.gguf"),
    "other part": ({0: part(0, 2, "a"), 1: part(0, 2, "b")}, "says that it is part 1 of 2"),
    "whole model as a part": ({0: part(0, 2, "a"), 1: gguf()}, "says that it is part 1 of 1"),
    "other count": ({0: part(0, 3, "a")}, "is part 1 of 3, its name should end so: -00001-of-00003.gguf"),
    "impossible number": ({0: part(5, 2, "a")}, "part '5' of '2', counted from 0, cannot be"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_a_broken_split_is_refused_by_name(tmp_path: Path, case: str) -> None:
    parts, words = SPLITS[case]
    for i, data in parts.items():
        put(tmp_path / f"m-{i + 1:05d}-of-00002.gguf", data)
    with pytest.raises(FormatError) as e:
        read_gguf_header(tmp_path / "m-00001-of-00002.gguf")
    assert words in str(e.value)
