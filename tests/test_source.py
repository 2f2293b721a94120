"""Stored tensors come out as the owning libraries read them, one at a time."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf as package
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from containers import entry, put, safetensors, small_gguf, small_safetensors
from transload.errors import FormatError, Unsupported
from transload.source import DTYPE_NAMES, open_source


def bytes_of(t: torch.Tensor) -> bytes:
    return t.reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b""


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.get)
def test_every_dtype_reads_as_the_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.arange(15).reshape(3, 5).to(torch.float32).to(dtype),
        "scalar": torch.ones(()).to(dtype),
        "empty": torch.empty(0, 4, dtype=dtype),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    source, expected = open_source(tmp_path), load_file(tmp_path / "model.safetensors")
    for name in tensors:
        found = source.read(name)
        assert (found.dtype, found.shape) == (dtype, expected[name].shape)
        assert bytes_of(found) == bytes_of(expected[name])


def test_four_bit_floats_keep_two_values_in_an_element(tmp_path: Path) -> None:
    t = torch.arange(12, dtype=torch.uint8).reshape(3, 4).view(torch.float4_e2m1fn_x2)
    save_file({"t": t}, tmp_path / "a.safetensors")
    source = open_source(tmp_path / "a.safetensors")
    assert source.infos["t"].shape == (3, 8)
    assert source.read("t").shape == (3, 4)
    assert bytes_of(source.read("t")) == bytes(range(12))


def test_a_dtype_that_torch_lacks_is_unsupported(tmp_path: Path) -> None:
    path = put(tmp_path / "a.safetensors", safetensors({"t": entry("F6_E2M3", [4], 0, 3)}, b"123"))
    with pytest.raises(Unsupported, match=r"tensor 't': torch cannot hold F6_E2M3 \(4,\)"):
        open_source(path).read("t")


def test_tensors_off_their_alignment_are_read(tmp_path: Path) -> None:
    data = safetensors(
        {"pad": entry("U8", [3], 0, 3), "t": entry("F32", [2], 3, 11)}, b"123" + struct.pack("<2f", 1, 2)
    )
    assert open_source(put(tmp_path / "a.safetensors", data)).read("t").tolist() == [1.0, 2.0]


def test_a_read_owns_its_memory(tmp_path: Path) -> None:
    path = put(tmp_path / "a.safetensors", small_safetensors())
    source = open_source(path)
    source.read("a.weight").zero_()
    assert source.read("a.weight").view(torch.uint8).reshape(-1).tolist() == list(range(24))
    assert path.read_bytes() == small_safetensors()


def test_an_absent_tensor_is_named(tmp_path: Path) -> None:
    for path in (put(tmp_path / "a.safetensors", small_safetensors()), put(tmp_path / "a.gguf", small_gguf())):
        with pytest.raises(FormatError, match=r"a\.\w+: no tensor 'gone'"):
            open_source(path).read("gone")


def test_a_file_cut_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = put(tmp_path / "a.safetensors", small_safetensors())
    source = open_source(path)
    put(path, small_safetensors()[:-4])
    with pytest.raises(FormatError, match=r"tensor 'one' ends at byte .*, the file has"):
        source.read("one")
    path.unlink()
    with pytest.raises(FormatError, match=r"tensor 'one' cannot be read: No such file"):
        source.read("one")


def test_gguf_tensors_equal_the_package(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    writer = package.GGUFWriter(path, "llama")
    weights = np.linspace(-1, 1, 4 * 256, dtype=np.float32).reshape(2, 2, 256)
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q8_0"):
        number = package.GGMLQuantizationType[kind]
        writer.add_tensor(kind, package.quantize(weights, number), raw_dtype=number)
    writer.add_tensor("f32", weights)
    writer.add_tensor("f16", weights.astype(np.float16))
    writer.add_tensor("i32", np.arange(6, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = open_source(path)
    assert (source.container, source.config, source.json("config.json")) == ("gguf", {}, None)
    for tensor in package.GGUFReader(path).tensors:
        found = source.read(tensor.name)
        assert bytes_of(found) == tensor.data.tobytes()
        if tensor.name.startswith("Q"):
            assert (found.dtype, found.shape) == (torch.uint8, tensor.data.shape)
    assert source.read("f32").tolist() == weights.tolist()
    assert (source.read("f16").dtype, source.read("f16").shape) == (torch.float16, (2, 2, 256))


def test_json_beside_the_weights_is_found_for_files_and_folders(tmp_path: Path) -> None:
    path = put(tmp_path / "model.safetensors", small_safetensors())
    put(tmp_path / "config.json", b'{"model_type": "llama"}')
    for place in (path, tmp_path):
        source = open_source(place)
        assert source.config == {"model_type": "llama"}
        assert source.json("config.json") == source.config
        assert source.json("other.json") is None
