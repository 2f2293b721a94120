"""A checkpoint appears whole or not at all, the libraries can load it, and a killed run continues to the same bytes."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from transload.errors import ConfigError, OutputExists, TransloadError
from transload.headers import read_headers
from transload.source import DTYPE_NAMES, open_source
from transload.writer import Plan, Writer, lay_out


def tensors(count: int = 6, size: int = 100) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    dtypes = [torch.uint8, torch.bfloat16, torch.float32]
    return {f"t{i}": (torch.rand(size, i + 1, generator=g) * 9).to(dtypes[i % 3]) for i in range(count)}


def plan_of(found: dict[str, Tensor]) -> Plan:
    return {name: (t.dtype, tuple(t.shape)) for name, t in found.items()}


def write(path: Path, found: dict[str, Tensor], **options: object) -> Path:
    with Writer(path, plan_of(found), **options) as writer:  # type: ignore[arg-type]
        for name, t in found.items():
            writer.add(name, t)
        writer.add_json("config.json", {"model_type": "llama"})
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()


def test_the_library_loads_every_dtype(tmp_path: Path) -> None:
    found = {f"t{i}": torch.randint(0, 2, (3, 5)).to(d) for i, d in enumerate(DTYPE_NAMES)}
    found |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "strided": torch.rand(4, 6).T[1:]}
    found["f4"] = torch.arange(12, dtype=torch.uint8).reshape(3, 4).view(torch.float4_e2m1fn_x2)
    path = write(tmp_path / "out", found)
    loaded = load_file(path / "model.safetensors")
    assert loaded.keys() == found.keys()
    for name in found.keys() - {"f4"}:
        assert same(loaded[name], found[name]), name
    assert loaded["f4"].view(torch.uint8).tolist() == found["f4"].view(torch.uint8).tolist()
    with safe_open(path / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}


def test_tensors_are_aligned_to_their_elements(tmp_path: Path) -> None:
    found = {"odd": torch.ones(3, dtype=torch.uint8), "double": torch.ones(1, dtype=torch.float64), **tensors()}
    for info in read_headers(write(tmp_path / "out", found)).values():
        assert info.start % found[info.name].element_size() == 0


def test_shards_follow_the_plan_and_the_limit(tmp_path: Path) -> None:
    found = tensors()
    path = write(tmp_path / "out", found, max_shard_bytes=1500)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in found.values())}
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    assert [index["weight_map"][name] for name in found] == sorted(index["weight_map"][name] for name in found)
    for file in files:
        held = [found[name].nbytes for name, shard in index["weight_map"].items() if shard == file]
        assert sum(held) <= 1500 or len(held) == 1
    source = open_source(path)
    assert all(same(source.read(name), t) for name, t in found.items())


def test_another_stem_names_files_and_index(tmp_path: Path) -> None:
    path = write(tmp_path / "out", tensors(), max_shard_bytes=1500, stem="quant_model_weights")
    assert (path / "quant_model_weights.safetensors.index.json").is_file()
    assert read_headers(path).keys() == tensors().keys()


def test_the_order_of_arrival_changes_no_byte(tmp_path: Path) -> None:
    found = tensors()
    forward = write(tmp_path / "a", found, max_shard_bytes=2000)
    with Writer(tmp_path / "b", plan_of(found), max_shard_bytes=2000) as writer:
        writer.add_json("config.json", {"model_type": "llama"})
        for name in reversed(found):
            writer.add(name, found[name])
    assert contents(forward) == contents(tmp_path / "b")


def test_other_files_lie_beside_the_weights(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"{}")
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "blob")
    with Writer(tmp_path / "out", {}) as writer:
        writer.carry(tmp_path / "tokenizer.json")
        writer.carry(tmp_path / "blob", "other.json")
        writer.add_bytes("tokenizer.model", b"\0\1")
        writer.add_json("config.json", {"ü": 1})
        for name in ("tokenizer.json", "model.safetensors", "model.safetensors.index.json", "../x", "a/b", ""):
            with pytest.raises(ConfigError, match="is taken or is no plain file name"):
                writer.add_bytes(name, b"")
        with pytest.raises(ConfigError, match="gone: no such file"):
            writer.carry(tmp_path / "gone")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == b"{}"
    assert not (tmp_path / "out" / "tokenizer.json").is_symlink()
    assert json.loads((tmp_path / "out" / "config.json").read_bytes()) == {"ü": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["blob", "out", "tokenizer.json"]


def test_nothing_is_visible_before_the_end(tmp_path: Path) -> None:
    with Writer(tmp_path / "deep" / "out", plan_of(tensors())) as writer:
        for name, t in tensors().items():
            writer.add(name, t)
            assert not (tmp_path / "deep" / "out").exists()
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["out"]


@pytest.mark.parametrize("resume", [False, True])
def test_an_exception_leaves_no_result(tmp_path: Path, resume: bool) -> None:
    writer = Writer(tmp_path / "out", plan_of(tensors()), resume=resume)
    with pytest.raises(KeyboardInterrupt), writer:
        interrupted(writer)
    assert [p.name for p in tmp_path.iterdir()] == (["out.partial"] if resume else [])


def interrupted(writer: Writer) -> None:
    writer.add("t0", tensors()["t0"])
    raise KeyboardInterrupt


MISUSE = {
    "not planned": (lambda w: w.add("x", torch.ones(1)), "tensor 'x' is not planned"),
    "other dtype": (
        lambda w: w.add("t0", torch.ones(100, 1)),
        r"'t0' is torch.float32 \(100, 1\), planned was torch.uint8",
    ),
    "other shape": (
        lambda w: w.add("t0", torch.ones(1, 100, dtype=torch.uint8)),
        r"\(1, 100\), planned was .* \(100, 1\)",
    ),
    "twice": (lambda w: [w.add("t0", tensors()["t0"]) for _ in range(2)], "'t0' comes twice"),
    "incomplete": (lambda w: w.add("t0", tensors()["t0"]), r"5 planned tensors were not written: t1, t2, t3, \.\.\."),
}


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    act, words = MISUSE[case]
    with pytest.raises(ConfigError, match=words), Writer(tmp_path / "out", plan_of(tensors())) as writer:
        act(writer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("plan", "options", "words"),
    [
        ({"a": (torch.complex128, (1,))}, {}, "'a': safetensors cannot store it as torch.complex128"),
        ({"__metadata__": (torch.float32, (1,))}, {}, "'__metadata__'"),
        ({}, {"max_shard_bytes": 0}, "max_shard_bytes 0"),
    ],
)
def test_impossible_plans_are_refused(tmp_path: Path, plan: Plan, options: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        lay_out(plan, **options)
    with pytest.raises(ConfigError, match=words):
        Writer(tmp_path / "out", plan, **options)  # type: ignore[arg-type]


def test_an_existing_target_is_kept_unless_overwriting_is_asked_for(tmp_path: Path) -> None:
    old = write(tmp_path / "out", tensors(2))
    before = contents(old)
    with pytest.raises(OutputExists, match="exists already"):
        write(old, tensors(3))
    with pytest.raises(KeyboardInterrupt), Writer(old, plan_of(tensors(3)), overwrite=True) as writer:
        interrupted(writer)
    assert contents(old) == before
    write(old, tensors(3), overwrite=True)
    assert read_headers(old).keys() == tensors(3).keys()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    mine = tmp_path / "elsewhere"
    mine.mkdir()
    (mine / "notes").write_text("x")
    with pytest.raises(OutputExists), Writer(tmp_path / "out", {}):
        mine.rename(tmp_path / "out")
    assert contents(tmp_path / "out") == {"notes": b"x"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    write(home, tensors(1))  # an empty folder may be filled
    (tmp_path / "link").symlink_to(home)
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("x")
    for name in ("link", "file", "photos"):
        with pytest.raises(OutputExists, match="is no checkpoint folder"):
            write(tmp_path / name, tensors(1), overwrite=True)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_the_source_is_out_of_reach(tmp_path: Path) -> None:
    source = write(tmp_path / "models" / "source", tensors(1))
    before = contents(source)
    for target in (source, source / "out", tmp_path / "models", tmp_path / "models" / "x" / ".." / "source"):
        with pytest.raises(ConfigError, match="is in the way of its own source"):
            write(target, tensors(1), source=source, overwrite=True)
    with pytest.raises(ConfigError, match="is in the way"):
        write(source, tensors(1), source=source / "model.safetensors", overwrite=True)
    write(source / "beside", tensors(1), source=source / "model.safetensors")
    assert contents(source) == before


def test_the_current_folder_and_its_parent_have_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert Writer(".", {}).partial == tmp_path / "a" / "b.partial"
    with pytest.raises(OutputExists, match="is no checkpoint folder"):
        Writer("..", {}, overwrite=True)
    with pytest.raises(ConfigError, match="is no place for a checkpoint"):
        Writer("/", {}, overwrite=True)


def test_a_disk_without_room_is_found_before_writing(tmp_path: Path) -> None:
    with pytest.raises(TransloadError, match=r"needs \d+ bytes, the disk has \d+ bytes free"):
        Writer(tmp_path / "out", {"a": (torch.float32, (1 << 50,))}).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk: the system refuses the bytes in the middle of the work."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        writer = Writer(tmp_path / "out", plan_of(tensors()))
        with pytest.raises(TransloadError, match=r"out.*: cannot be written: File too large"), writer:
            writer.add_bytes("tokenizer.json", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(TransloadError, match="cannot be written"):
        write(tmp_path / "file" / "out", tensors(1))


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_writer import plan_of, tensors
from transload.writer import Writer
found = tensors(40)
with Writer(sys.argv[2], plan_of(found), resume=True, job="j", max_shard_bytes=9000, sync_bytes=2000) as writer:
    writer.add_bytes("left.txt", b"from the first run")
    for i, name in enumerate(found):
        if i == 25:
            os.kill(os.getpid(), signal.SIGKILL)
        writer.add(name, found[name])
"""


@pytest.fixture(scope="module")
def killed_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The partial folder of a run that was killed after 25 of 40 tensors."""
    target = tmp_path_factory.mktemp("killed") / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(Path(__file__).parent), str(target)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not target.exists()
    return target.with_name("out.partial")


@pytest.fixture
def killed(tmp_path: Path, killed_once: Path) -> Path:
    """A target beside which that partial folder lies."""
    shutil.copytree(killed_once, tmp_path / "out.partial")
    return tmp_path / "out"


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path, killed: Path) -> None:
    found = tensors(40)
    with Writer(killed, plan_of(found), resume=True, job="j", max_shard_bytes=9000) as writer:
        assert 15 < len(writer.finished) <= 25
        for name in found.keys() - writer.finished:
            writer.add(name, found[name])
        writer.add_json("config.json", {"model_type": "llama"})
    assert contents(killed) == contents(write(tmp_path / "whole", found, max_shard_bytes=9000))
    assert not killed.with_name("out.partial").exists()


def test_an_unfinished_run_is_not_thrown_away_silently(killed: Path) -> None:
    with pytest.raises(OutputExists, match=r"out\.partial: is left from an unfinished run; resume it or delete it"):
        write(killed, tensors(40))
    with pytest.raises(ConfigError, match="is left from a different port"):
        write(killed, tensors(40), resume=True, job="other", max_shard_bytes=9000)
    with pytest.raises(ConfigError, match="is left from a different port"):
        write(killed, tensors(39), resume=True, job="j", max_shard_bytes=9000)
    write(killed, tensors(2), overwrite=True)
    assert read_headers(killed).keys() == tensors(2).keys()


def test_a_damaged_partial_folder_is_refused(killed: Path) -> None:
    partial = killed.with_name("out.partial")
    shard = min(partial.glob("*.safetensors"))
    os.truncate(shard, 100)
    with pytest.raises(ConfigError, match="is not what the journal says"):
        write(killed, tensors(40), resume=True, job="j", max_shard_bytes=9000)
    (partial / "port.journal").write_bytes(b"\xff\n")
    with pytest.raises(ConfigError, match="damaged"):
        write(killed, tensors(40), resume=True, job="j", max_shard_bytes=9000)


def test_a_torn_journal_line_does_not_count(killed: Path) -> None:
    journal = killed.with_name("out.partial") / "port.journal"
    journal.write_bytes(journal.read_bytes() + b'"t3')
    with Writer(killed, plan_of(tensors(40)), resume=True, job="j", max_shard_bytes=9000) as writer:
        assert len(writer.finished) > 15
        for name, t in tensors(40).items():
            writer.add(name, t)


def test_two_writers_of_one_target_do_not_meet(tmp_path: Path) -> None:
    with Writer(tmp_path / "out", plan_of(tensors(1)), resume=True) as writer:
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(TransloadError, match="another process is writing it"):
                write(tmp_path / "out", tensors(1), **options)
        writer.add("t0", tensors(1)["t0"])
    assert read_headers(tmp_path / "out").keys() == {"t0"}
