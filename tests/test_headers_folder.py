"""Folders of shards: the index is believed only where the shards agree with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from containers import entry, gguf, put, safetensors, small_gguf, small_safetensors
from transload.errors import FormatError
from transload.headers import checkpoint_files, read_headers, read_json

A, B = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def one(name: str) -> bytes:
    return safetensors({name: entry("U8", [4], 0, 4)}, b"1234")


def sharded(folder: Path, weight_map: object = None, index: str = "model.safetensors.index.json") -> Path:
    put(folder / A, one("a"))
    put(folder / B, one("b"))
    value = {"weight_map": {"a": A, "b": B} if weight_map is None else weight_map}
    put(folder / index, json.dumps(value).encode())
    return folder


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "quant_model_weights.safetensors.index.json"])
def test_an_index_decides_which_files_belong(tmp_path: Path, index: str) -> None:
    sharded(tmp_path, index=index)
    put(tmp_path / "consolidated.safetensors", one("a"))
    infos = read_headers(tmp_path)
    assert {name: info.file.name for name, info in infos.items()} == {"a": A, "b": B}
    assert [p.name for p in checkpoint_files(tmp_path)] == [A, B]


def test_without_an_index_the_main_file_stands_alone(tmp_path: Path) -> None:
    put(tmp_path / "model.safetensors", one("a"))
    put(tmp_path / "consolidated.safetensors", one("a"))
    assert [i.file.name for i in read_headers(tmp_path).values()] == ["model.safetensors"]


def test_without_an_index_all_files_are_read(tmp_path: Path) -> None:
    put(tmp_path / "x.safetensors", one("a"))
    put(tmp_path / "y.safetensors", one("b"))
    assert list(read_headers(tmp_path)) == ["a", "b"]


def test_links_as_in_the_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").symlink_to(put(blobs / "0123abc", small_safetensors()))
    (snapshot / "model.gguf").symlink_to(put(blobs / "4567def", small_gguf()))
    assert "a.weight" in read_headers(snapshot)
    assert "w" in read_headers(snapshot / "model.gguf")
    assert "w" in read_headers(blobs / "4567def")


def test_the_only_gguf_file_of_a_folder_is_read(tmp_path: Path) -> None:
    put(tmp_path / "m.gguf", small_gguf())
    assert list(read_headers(tmp_path)) == ["w", "norm"]


FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "nothing there": (lambda p: (p).rmdir(), ("no such file or folder",)),
    "empty folder": (lambda p: None, ("no .safetensors and no .gguf",)),
    "pickles only": (
        lambda p: put(p / "pytorch_model.bin", b"\x80"),
        ("pytorch_model.bin is a pickle file", "save_pretrained"),
    ),
    "two GGUF files": (
        lambda p: [put(p / n, gguf()) for n in ("a.gguf", "b.gguf")],
        ("2 GGUF files (a.gguf, b.gguf)", "give the path of one"),
    ),
    "two indexes": (
        lambda p: [put(p / f"{n}.safetensors.index.json", b"{}") for n in "xy"],
        ("several index files", "x.safetensors.index.json"),
    ),
    "a shard is missing": (
        lambda p: (sharded(p) / B).unlink(),
        ("1 of 2 shards named by model.safetensors.index.json are missing", B),
    ),
    "a tensor is in no shard": (lambda p: sharded(p, {"a": A, "b": B, "c": B}), ("tensor 'c'", "in no shard")),
    "a tensor is in another shard": (lambda p: sharded(p, {"a": B, "b": A}), ("tensor 'a' should be in " + B, A)),
    "a tensor is in two shards": (lambda p: put(sharded(p) / B, one("a")), ("tensor 'a' is also in " + A,)),
    "up and out": (lambda p: sharded(p, {"a": "../x.safetensors"}), ("tensor 'a'", "'../x.safetensors'")),
    "absolute": (lambda p: sharded(p, {"a": "/etc/passwd"}), ("'/etc/passwd'", "file name in this folder")),
    "backslashes": (lambda p: sharded(p, {"a": "..\\x"}), ("file name in this folder",)),
    "empty name": (lambda p: sharded(p, {"a": ""}), ("file name in this folder",)),
    "dots": (lambda p: sharded(p, {"a": ".."}), ("file name in this folder",)),
    "shard is a number": (lambda p: sharded(p, {"a": 1}), ("tensor 'a' is in '1'",)),
    "no weight_map": (lambda p: sharded(p, []), ("weight_map is '[]'",)),
    "empty weight_map": (lambda p: sharded(p, {}), ("weight_map is '{}'",)),
    "index is a list": (
        lambda p: put(sharded(p) / "model.safetensors.index.json", b"[]"),
        ("JSON list, expected an object",),
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_a_broken_folder_is_refused_by_name(tmp_path: Path, case: str) -> None:
    prepare, words = FOLDERS[case]
    folder = tmp_path / "model"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(FormatError) as e:
        read_headers(folder)
    assert str(folder) in str(e.value)
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "JSON list, expected an object"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b"\xff\xfe", "not UTF-8"),
    ],
    ids=["empty", "list", "twice", "deep", "encoding"],
)
def test_bad_json_is_refused_by_name(tmp_path: Path, data: bytes, words: str) -> None:
    path = put(tmp_path / "config.json", data)
    with pytest.raises(FormatError, match=words) as e:
        read_json(path)
    assert str(e.value).startswith(str(path))


def test_reading_a_folder_imports_neither_torch_nor_numpy(tmp_path: Path) -> None:
    sharded(tmp_path)
    code = (
        "import sys, transload.headers as h; h.read_headers(sys.argv[1]);"
        "sys.exit(len({'torch', 'numpy', 'gguf'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 0
