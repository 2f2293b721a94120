"""Packed weights kept in a file: the same answers, bytes and reports as packing, and nothing foreign or damaged."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import logits, make
from transformers import PreTrainedModel
from typer.testing import CliRunner

import transload
from transload import checkpoint as checkpoints
from transload.cli import app
from transload.errors import ConfigError, FormatError
from transload.hal import Packed, Problem, backends, choose, find_device
from transload.quant import QTensor, QuantSpec, Zero
from transload.reference import quantize_rtn
from transload.runtime import TransloadConfig, packed_file, report
from transload.runtime.below import KeptWeight
from transload.runtime.kept import KeptPart
from transload.runtime.packed_cache import PackedCache, binding
from transload.runtime.stored import StoredWeights

CPU = find_device("cpu")
pytestmark = pytest.mark.skipif(
    choose(CPU[0], Problem(8, 32, QuantSpec(4, 32)), CPU[1]).kernel.layout is None,
    reason="the native kernels are not built",
)


def folder_of(name: str, path: Path, **recipe: object) -> Path:
    """A tiny quantized model in Transload's own format."""
    make(name, path / "floats")
    config = TransloadConfig(group_size=32, device="cpu", **recipe)  # type: ignore[arg-type]
    transload.load(path / "floats", quantize=config, dtype=torch.float32).save_pretrained(path / "model")
    return path / "model"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of("llama", tmp_path_factory.mktemp("made"))


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of its own for every test."""
    return Path(shutil.copytree(made, tmp_path / "model"))


def load(path: Path, where: bool | str | Path = True, scheme: str | None = None) -> PreTrainedModel:
    return transload.load(path, device="cpu", packed_cache=where, scheme=scheme)


def told(model: PreTrainedModel) -> str:
    return report(model).packed_cache


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("llama", {}),
        ("llama", {"symmetric": False, "bits": 8}),
        ("qwen2-tied", {"quantize_head": True}),
        ("qwen3-moe", {}),
    ],
)
def test_a_second_start_decodes_nothing_and_answers_alike(
    name: str, recipe: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_of(name, tmp_path, **recipe)
    first = load(path)
    assert "written to" in told(first)
    monkeypatch.setattr(StoredWeights, "_decode", None)  # whoever decodes fails
    second = load(path)
    assert "mapped from" in told(second)
    assert torch.equal(logits(first), logits(second))
    assert report(first).modules == report(second).modules


@pytest.mark.parametrize("name", ["llama", "qwen2-tied"])
def test_what_is_saved_after_a_mapped_load_has_the_same_bytes(name: str, tmp_path: Path) -> None:
    path = folder_of(name, tmp_path, quantize_head=True)
    load(path)
    load(path).save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (path / file).read_bytes()


def test_one_file_serves_both_schemes(folder: Path) -> None:
    load(folder, scheme="w4a8")
    plain = transload.load(folder, device="cpu", scheme="w4a16")
    mapped = load(folder, scheme="w4a16")
    assert "mapped from" in told(mapped)
    assert torch.equal(logits(plain), logits(mapped))
    assert {m.executed for m in report(mapped).modules} == {"W4A16"}


def test_mapped_weights_are_aligned_and_private(folder: Path) -> None:
    load(folder)
    file = folder / "transload.packed"
    before = file.read_bytes()
    mapped = load(folder)
    packed = next(m for m in mapped.modules() if hasattr(m, "packed_parts") or hasattr(m, "x_dtype"))
    for tensor in packed.buffers():
        assert tensor.data_ptr() % 64 == 0
        tensor.zero_()
    assert file.read_bytes() == before
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["kind"] == packed_file.KIND


def test_without_being_asked_nothing_is_written(folder: Path) -> None:
    before = sorted(folder.iterdir())
    assert told(transload.load(folder, device="cpu")) == ""
    assert sorted(folder.iterdir()) == before


def test_the_place_can_be_a_folder_or_a_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "caches").mkdir()
    load(folder, tmp_path / "caches")
    (one,) = (tmp_path / "caches").iterdir()
    assert one.name.startswith("model-")
    assert one.suffix == ".packed"
    load(folder, str(tmp_path / "own.packed"))
    assert "mapped from" in told(load(folder, tmp_path / "own.packed"))
    with pytest.raises(ConfigError, match=r"ends in \.packed"):
        load(folder, folder / "model.safetensors")


def test_a_model_that_lies_partly_on_disk_keeps_the_rest(folder: Path) -> None:
    expected = logits(transload.load(folder, device="cpu"))
    places = dict.fromkeys(["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    for outcome in ("written to", "mapped from"):
        spread = transload.load(folder, plan={**places, "model.layers.1": "disk"}, packed_cache=True)
        assert outcome in told(spread)
        assert torch.equal(logits(spread), expected)
    assert "written to" in told(load(folder))  # the layer that was on the disk is added
    assert "mapped from" in told(load(folder))


def test_a_float_checkpoint_has_nothing_to_keep(tmp_path: Path) -> None:
    make("llama", tmp_path)
    with pytest.raises(ConfigError, match="is float"):
        load(tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is a place where not even root writes")
def test_a_place_that_cannot_be_written_is_refused_before_loading(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written \(.+\): give packed_cache=PATH"):
        load(folder, Path("/proc/none.packed"))


def test_a_disk_that_is_full_costs_the_file_and_not_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        model = load(folder)
    assert "not kept" in told(model)
    assert not [p for p in folder.iterdir() if p.suffix in (".packed", ".partial")]


def touched(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.utime(file, ns=(1, 1))


def other_numbers(folder: Path) -> None:
    """The last byte of the weights, with the time that was there."""
    file = folder / "model.safetensors"
    times = file.stat()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def other_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))


@pytest.mark.parametrize("change", [touched, other_numbers, other_config])
def test_a_changed_checkpoint_is_packed_anew(folder: Path, change: Callable[[Path], None]) -> None:
    load(folder)
    change(folder)
    again = load(folder)
    assert "written to" in told(again)
    assert "belongs to another checkpoint" in told(again)
    assert torch.equal(logits(again), logits(transload.load(folder, device="cpu")))
    assert "mapped from" in told(load(folder))


def test_another_version_packs_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    monkeypatch.setattr("transload.runtime.packed_cache.__version__", "99")
    assert "another Transload" in told(load(folder))


def test_another_layout_packs_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    before = next(kernel.layout for kernel in CPU[0].kernels if kernel.layout)
    for kernel in CPU[0].kernels:
        monkeypatch.setattr(type(kernel), "layout", kernel.layout and "native-99")
    again = load(folder)
    assert f"packs native-99, not {before}" in told(again)
    assert "written to" in told(again)


def flipped(at: float) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        i = int(len(data) * at)
        return data[:i] + bytes([data[i] ^ 16]) + data[i + 1 :]

    return change


def reindexed(change: Callable[[dict[str, list[dict[str, object]]]], object]) -> Callable[[bytes], bytes]:
    """The same file with another index."""

    def changed(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        index = json.loads(header["__metadata__"]["index"])
        index = change(index) or index
        header["__metadata__"]["index"] = index if isinstance(index, str) else json.dumps(index)
        text = json.dumps(header).encode()
        text += b" " * (-(8 + len(text)) % 64)
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    return changed


def every_part(**fields: object) -> Callable[[bytes], bytes]:
    def change(index: dict[str, list[dict[str, object]]]) -> None:
        for parts in index.values():
            parts[0].update(fields)

    return reindexed(change)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:5], id="five bytes"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: data[:-1], id="a byte short"),
        pytest.param(lambda data: data + b"\0", id="a byte long"),
        pytest.param(flipped(0.5), id="a bit in the middle"),
        pytest.param(flipped(0.9999), id="a bit near the end"),
        pytest.param(lambda data: (1 << 62).to_bytes(8, "little") + data[8:], id="an endless header"),
        pytest.param(lambda data: b"\x02\0\0\0\0\0\0\0{}", id="no tensors"),
        pytest.param(reindexed(lambda index: "[" * 5000), id="nested JSON"),
        pytest.param(reindexed(lambda index: "[]"), id="a list for an index"),
        pytest.param(reindexed(lambda index: {name: [] for name in index}), id="no parts"),
        pytest.param(reindexed(lambda index: {name: [{}] for name in index}), id="empty parts"),
        pytest.param(every_part(n=1 << 40, k=1 << 40), id="huge sizes"),
        pytest.param(every_part(n=-1), id="negative sizes"),
        pytest.param(every_part(n=True), id="sizes that are no numbers"),
        pytest.param(every_part(experts=2), id="experts that are none"),
        pytest.param(every_part(k=128), id="other sizes"),
        pytest.param(every_part(layout="rows-1"), id="another layout"),
        pytest.param(every_part(tensors={}), id="no tensors of a part"),
        pytest.param(every_part(tensors={"packed": ["uint8", [-64], ""]}), id="a negative shape"),
        pytest.param(every_part(tensors={"packed": ["float64", [1], ""]}), id="an unknown dtype"),
        pytest.param(every_part(spec={"bits": 4}), id="half a scheme"),
    ],
)
def test_a_damaged_or_hostile_file_is_written_anew(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    expected = logits(load(folder))
    file = folder / "transload.packed"
    good = file.read_bytes()
    file.write_bytes(damage(good))
    again = load(folder)
    assert "written to" in told(again)
    assert "was not used: " in told(again)
    assert torch.equal(logits(again), expected)
    assert file.read_bytes() == good


def weight(spec: QuantSpec, n: int = 40, k: int = 96) -> QTensor:
    torch.manual_seed(n)
    return quantize_rtn(torch.randn(n, k), spec)


@pytest.mark.parametrize(
    "other",
    [
        weight(QuantSpec(4, 32), n=64),
        weight(QuantSpec(4, 32), k=64),
        weight(QuantSpec(8, 32)),
        weight(QuantSpec(4, 16)),
        weight(QuantSpec(4, 32, zero=Zero.CODES)),
        weight(QuantSpec(4, 32, scale_dtype=torch.float16)),
    ],
)
def test_a_block_that_is_another_weight_is_not_believed(other: QTensor) -> None:
    """Sizes inside the block lead the kernels; they must be the ones that the module expects."""
    kernel, mine = CPU[0].kernels[0], weight(QuantSpec(4, 32))
    good = kernel.pack(mine)
    kernel.verify(good)
    foreign = Packed(kernel.name, mine.spec, mine.n, mine.k, kernel.pack(other).tensors)
    for bad in (foreign, Packed(kernel.name, mine.spec, mine.n, mine.k, {"packed": good.tensors["packed"][:-64]})):
        with pytest.raises(FormatError, match=r"N=40, K=96"):
            kernel.verify(bad)


def test_an_order_of_inputs_that_leads_outside_is_not_believed() -> None:
    kernel, plain = CPU[0].kernels[0], weight(QuantSpec(4, 32))
    g_idx = torch.arange(96, dtype=torch.int32).flip(0) // 32
    w = QTensor(QuantSpec(4, 32, act_order=True), plain.codes, plain.scales, g_idx=g_idx)
    good = kernel.pack(w)
    kernel.verify(good)
    block = good.tensors["packed"].clone()
    block[-384:].view(torch.int32)[5] = 1 << 20
    with pytest.raises(FormatError, match="order of inputs"):
        kernel.verify(Packed(kernel.name, w.spec, w.n, w.k, {"packed": block}))


def test_weights_of_several_schemes_below_each_other_are_kept(tmp_path: Path) -> None:
    kernel = CPU[0].kernels[0]
    parts = [weight(QuantSpec(4, 32)), weight(QuantSpec(8, 32), n=24)]
    assert kernel.layout is not None
    kept = tuple(KeptPart(w.spec, w.n, w.k, None, kernel.layout, kernel.pack(w).tensors) for w in parts)
    packed_file.write(tmp_path / "x.packed", "b", {"m.weight": KeptWeight(kept)})
    found = packed_file.read(tmp_path / "x.packed", "b")["m.weight"]
    assert (found.n, found.k) == (64, 96)
    for part, w in zip(found.parts, parts, strict=True):
        assert kernel.unpack(Packed(kernel.name, part.spec, part.n, part.k, part.tensors)).equal(w)
    with pytest.raises(FormatError, match="belongs to another"):
        packed_file.read(tmp_path / "x.packed", "c")


def test_kernels_without_a_layout_take_nothing_from_files() -> None:
    for backend in backends().values():
        for kernel in backend.kernels:
            assert (kernel.layout is None) == (type(kernel).verify is transload.hal.Kernel.verify)


def test_the_binding_follows_the_checkpoint_and_not_its_place(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert binding(checkpoints.open(folder)) == binding(checkpoints.open(tmp_path / "link"))
    assert isinstance(PackedCache(True, checkpoints.open(folder, "native")).path, Path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [([], False), (["--packed-cache"], True), (["--packed-cache-at", "x.packed"], Path("x.packed"))],
)
def test_the_command_passes_the_place_on(options: list[str], expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(*arguments: object, packed_cache: object, **more: object) -> None:
        asked.append(packed_cache)
        raise ConfigError("enough")

    monkeypatch.setattr("transload.runtime.load", load)
    CliRunner().invoke(app, ["run", "model", "-p", "hello", *options])
    assert asked == [expected]
