"""Writing: nothing unasked is replaced, nothing is half written, what is old is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.plans import CASES
from transload.errors import ConfigError, OutputExists
from transload.launch import read_manifest
from transload.launch.render import render
from transload.launch.write import edited, write

ONE = next(c for c in CASES if c.id == "Qwen3-8B-1xH100-bf16")
TWO = next(c for c in CASES if c.id == "Qwen3-235B-A22B-2x8xH100-bf16-tp8-pp2")


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_writing_again_changes_nothing(tmp_path: Path) -> None:
    files = render(ONE.plan(), "/m").files
    first = write(files, tmp_path / "new" / "folder")
    assert set(first.created) == set(files)
    second = write(files, tmp_path / "new" / "folder")
    assert set(second.unchanged) == set(files)
    assert os.access(tmp_path / "new" / "folder" / "preflight.sh", os.X_OK)
    assert read_manifest(tmp_path / "new" / "folder").files.keys() | {"launch.json"} == files.keys()


def test_other_files_are_replaced_only_when_asked(tmp_path: Path) -> None:
    write(render(ONE.plan(), "/m").files, tmp_path)
    before = _tree(tmp_path)
    other = render(ONE.plan(), "/other").files
    with pytest.raises(OutputExists, match="differ from what would be written; give --force"):
        write(other, tmp_path)
    assert _tree(tmp_path) == before
    assert "shell/node.sh" in write(other, tmp_path, force=True).changed


def test_files_of_an_older_rendering_are_named_and_kept(tmp_path: Path) -> None:
    write(render(TWO.plan(), "/m").files, tmp_path)
    written = write(render(ONE.plan(), "/m").files, tmp_path, force=True)
    assert "shell/node-1.sh" in written.stale
    assert (tmp_path / "shell" / "node-1.sh").exists()
    assert "shell/node.sh" not in written.stale


def test_edited_and_missing_files_are_told_apart(tmp_path: Path) -> None:
    write(render(ONE.plan(), "/m").files, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "shell" / "node.sh").unlink()
    assert edited(tmp_path, read_manifest(tmp_path)) == (["shell/node.sh"], ["README.md"])


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        write({"a.txt": "x"}, tmp_path / "file")
    with pytest.raises(ConfigError, match=r"is a file, not a folder|cannot be written"):
        write({"a.txt": "x"}, tmp_path / "file" / "deeper")
    (tmp_path / "out" / "a").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is a folder or leads out of"):
        write({"a": "x"}, tmp_path / "out")
    (tmp_path / "out" / "b").write_text("x")
    with pytest.raises(ConfigError, match="is a file, not a folder"):
        write({"b/c": "x"}, tmp_path / "out")


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "secret").write_text("keep")
    (tmp_path / "out" / "a.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ConfigError, match="leads out of"):
        write({"a.txt": "x"}, tmp_path / "out", force=True)
    assert (tmp_path / "secret").read_text() == "keep"


def test_a_folder_that_cannot_be_written() -> None:
    """As root every folder can be written, so the refusal is the file system's: /proc takes no files."""
    with pytest.raises(ConfigError, match="/proc: cannot be written"):
        write({"a.txt": "x"}, "/proc/transload-out")


def test_a_failure_leaves_no_part_files_and_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def full(source: str, target: str) -> None:
        if str(target).endswith("plan.json"):
            raise OSError(28, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ConfigError, match=r"plan\.json: cannot be written: No space left"):
        write(render(ONE.plan(), "/m").files, tmp_path)
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert "launch.json" not in left
    assert not [name for name in left if name.endswith(".part")]
