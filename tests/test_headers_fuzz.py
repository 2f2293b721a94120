"""Mutated files of both containers: a valid reading or a TransloadError, never anything else, in bounded memory."""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from containers import ARRAY, STRING, U8, array, gguf, pair, put, record, safetensors, small_gguf, small_safetensors
from transload.errors import TransloadError
from transload.headers import TensorInfo, read_gguf_header, read_headers
from transload.source import open_source

VALID = {"safetensors": small_safetensors(), "gguf": small_gguf()}
EDGES = [0, 1, 2, 7, 8, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
TOKENS = [b"[", b"]", b"{", b"}", b'"', b",", b":", b"-", b"null", b"1e9", b"NaN", b"\\u0000", b"99999999999999999999"]


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The file after one to four flips, overwrites with extreme integers, insertions, deletions and cuts."""
    out = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(out) - 1, 0)))
        kind = draw(st.sampled_from(("flip", "u32", "u64", "token", "insert", "delete", "copy", "cut")))
        if kind == "flip" and out:
            out[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "u32":
            out[at : at + 4] = struct.pack("<I", draw(st.sampled_from(EDGES)) & 0xFFFFFFFF)
        elif kind == "u64":
            out[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(EDGES)))
        elif kind == "token":
            token = draw(st.sampled_from(TOKENS))
            out[at : at + len(token)] = token
        elif kind == "insert":
            out[at:at] = draw(st.binary(min_size=1, max_size=16))
        elif kind == "delete":
            del out[at : at + draw(st.integers(1, 16))]
        elif kind == "copy":
            out[at:at] = out[at : at + draw(st.integers(1, 64))]
        else:
            del out[at:]
    return bytes(out)


def read_all(path: Path) -> None:
    """Reads header, metadata and every tensor, and checks what a valid reading promises."""
    source = open_source(path)
    size, spans = path.stat().st_size, []
    for info in source.infos.values():
        assert isinstance(info, TensorInfo)
        assert 0 <= info.start <= info.end <= size
        spans.append((info.start, info.end))
        assert source.read(info.name).nbytes == info.nbytes
    for (_, end), (start, _) in zip(sorted(spans), sorted(spans)[1:], strict=False):
        assert end <= start
    if source.container == "gguf":
        metadata = read_gguf_header(path).metadata
        for key in metadata:
            try:
                repr(metadata[key])
            except TransloadError as e:
                check(e, path)


def check(error: TransloadError, path: Path) -> None:
    assert str(path) in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 1000 + 3 * len(str(path))


@pytest.mark.parametrize("container", VALID)
def test_mutated_files_are_read_or_refused(container: str) -> None:
    @settings(max_examples=400, deadline=None)
    @given(mutated(VALID[container]))
    def run(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = put(Path(folder) / f"m.{container}", data)
            try:
                read_all(path)
            except TransloadError as e:
                check(e, path)

    run()


@pytest.mark.parametrize("container", VALID)
def test_every_truncation_is_refused(container: str, tmp_path: Path) -> None:
    data = VALID[container]
    for length in range(len(data)):
        path = put(tmp_path / f"m.{container}", data[:length])
        with pytest.raises(TransloadError) as e:
            read_all(path)
        check(e.value, path)


@pytest.mark.parametrize("container", VALID)
def test_every_flipped_bit_is_read_or_refused(container: str, tmp_path: Path) -> None:
    data = VALID[container]
    for at in range(len(data) - 40):
        flipped = bytearray(data)
        flipped[at] ^= 1 << (at % 8)
        path = put(tmp_path / f"m.{container}", bytes(flipped))
        try:
            read_all(path)
        except TransloadError as e:
            check(e, path)


HUNGRY: dict[str, Callable[[], bytes]] = {
    "strings.gguf": lambda: gguf([pair("a", ARRAY, array(STRING, 60_000, bytes(480_000)))]),
    "arrays.gguf": lambda: gguf([pair("a", ARRAY, array(ARRAY, 40_000, bytes(480_000)))]),
    "numbers.gguf": lambda: gguf([pair("a", ARRAY, array(U8, 480_000, bytes(480_000)))]),
    "tensors.gguf": lambda: gguf([], [record(f"{i:05}", (), 0, 32 * i) for i in range(10_000)], bytes(320_000)),
    "counts.gguf": lambda: gguf([], [], bytes(480_000), counts=(20_000, 0)),
    "lists.safetensors": lambda: safetensors(b'{"a":[' + b"[]," * 160_000 + b"[]]}"),
    "objects.safetensors": lambda: safetensors(b'{"a":[' + b"{}," * 160_000 + b"{}]}"),
    "dimensions.safetensors": lambda: safetensors(
        b'{"a":{"dtype":"U8","shape":[' + b"9," * 240_000 + b'9],"data_offsets":[0,0]}}'
    ),
    "names.safetensors": lambda: safetensors(b'{"a":0,' + b",".join(b'"%06d":0' % i for i in range(40_000)) + b"}"),
}


@pytest.mark.parametrize("name", HUNGRY)
def test_memory_follows_the_size_of_the_file(name: str, tmp_path: Path) -> None:
    data = HUNGRY[name]()
    path = put(tmp_path / name, data)
    read_headers(put(tmp_path / ("warm." + name.split(".")[1]), VALID[name.split(".")[1]]))
    tracemalloc.start()
    try:
        read_headers(path)
    except TransloadError as e:
        check(e, path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    # 32 times: the shortest member of a JSON object, "000000":0, has 11 bytes and becomes some 270 in Python.
    assert peak < 32 * len(data)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and resource limits")
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("header.safetensors", struct.pack("<Q", 90_000_000)),
        ("header2.safetensors", struct.pack("<Q", 2**63)),
        ("pairs.gguf", gguf(counts=(0, 2**60))),
        ("tensors.gguf", gguf(counts=(2**60, 0))),
        ("array.gguf", gguf([pair("a", ARRAY, array(U8, 2**40, b""))])),
        ("tensor.gguf", gguf([], [record("w", (2**40,), 0, 0)])),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_claimed_sizes_are_never_allocated(name: str, data: bytes, tmp_path: Path) -> None:
    """In a process that may not grow by more than 100 MB."""
    path = put(tmp_path / name, data)
    code = (
        "import resource, sys\n"
        "import transload.headers as h, gguf.constants\n"
        "from transload.errors import TransloadError\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 100_000_000,) * 2)\n"
        "try: h.read_headers(sys.argv[1])\n"
        "except TransloadError: sys.exit(7)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, check=False)
    assert done.returncode == 7, done.stderr.decode()[-500:]
