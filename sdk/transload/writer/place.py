"""Where a checkpoint may be written, and the file system's side of writing it safely."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transload.errors import ConfigError, OutputExists, TransloadError
from transload.headers.folder import is_gguf


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into a TransloadError that names the path."""
    try:
        yield
    except OSError as e:
        raise TransloadError(f"{path}: cannot be written: {e.strerror or e}") from e


def named(path: Path) -> Path:
    """The path ending in the folder's own name, which "." and ".." do not. Raises ConfigError for a root."""
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    if not path.name:
        raise ConfigError(f"{path}: is no place for a checkpoint; give a folder")
    return path


def check_apart(target: Path, source: Path) -> None:
    """Refuses a target that is the source's folder, contains it, or lies in it. Raises ConfigError."""
    folder = source if source.is_dir() else source.parent
    new, old = target.resolve(), folder.resolve()
    inside = old in new.parents and source.is_dir()  # beside a single file is a fine place for the result
    if new == old or new in old.parents or inside or new == source.resolve():
        raise ConfigError(f"{target}: is in the way of its own source {source}; give another folder")


def check_free(target: Path, overwrite: bool, single: bool = False) -> None:
    """Refuses an existing target, unless it is an empty folder, or a checkpoint that may be replaced.

    single: the target is to be a GGUF file. Raises OutputExists. What is no checkpoint is never replaced, so that a
    slip of the pen costs no home folder.
    """
    if not target.is_symlink() and not target.exists():
        return
    if single:
        return _check_file(target, overwrite)
    if not target.is_symlink() and target.is_dir() and not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputExists(f"{target}: exists already; choose another place or allow overwriting")
    marks = ("config.json", "*.safetensors")
    if target.is_symlink() or not target.is_dir() or not any(next(target.glob(m), None) for m in marks):
        raise OutputExists(f"{target}: exists and is no checkpoint folder, so it is not overwritten; delete it first")


def _check_file(target: Path, overwrite: bool) -> None:
    if not overwrite and not target.is_dir():
        raise OutputExists(f"{target}: exists already; choose another place or allow overwriting")
    if target.is_symlink() or not target.is_file() or not is_gguf(target):
        raise OutputExists(f"{target}: exists and is no GGUF file, so it is not overwritten; delete it first")


def check_space(folder: Path, needed: int) -> None:
    """Refuses to begin when `needed` bytes do not fit the disk. Raises TransloadError."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TransloadError(f"{folder}: needs {needed} bytes, the disk has {free} bytes free")


def take_name(partial: Path, target: Path) -> None:
    """Gives a finished folder its name, durably. What was there before is removed after the rename, not before."""
    old = target.with_name(target.name + ".replaced")
    if target.exists():
        if old.exists():
            shutil.rmtree(old)
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    sync_folder(target.parent)
    if old.exists():
        shutil.rmtree(old)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable, where the system lets folders be synced."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
