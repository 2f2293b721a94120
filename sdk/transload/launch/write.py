"""Writing a rendered folder: all or nothing, nothing overwritten unasked, files of an older rendering named."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from transload.errors import ConfigError, OutputExists
from transload.launch.manifest import FILE as MANIFEST
from transload.launch.manifest import Manifest, digest


@dataclass(frozen=True, slots=True)
class Written:
    """What changed in a folder. stale: files of an older rendering that this one does not have; they are left there."""

    created: tuple[str, ...]
    changed: tuple[str, ...]
    unchanged: tuple[str, ...]
    stale: tuple[str, ...]


def write(files: Mapping[str, str], folder: str | Path, force: bool = False) -> Written:
    """Writes files into a folder, launch.json last, so that a folder with a manifest is complete.

    Raises OutputExists when another file of that name is there and `force` is not given, and ConfigError when the
    folder cannot be written; both before anything is written. Equal files are left alone.
    """
    root = Path(folder)
    _writable(root)
    found = {name: _text(root, name) for name in files}
    created = tuple(name for name, text in found.items() if text is None)
    changed = tuple(name for name, text in found.items() if text is not None and text != files[name])
    if changed and not force:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise OutputExists(f"{root}: {', '.join(changed[:3])}{more} differ from what would be written; give --force")
    stale = _stale(root, files)
    try:
        for name in sorted((*created, *changed), key=lambda n: (n == MANIFEST, n)):
            _replace(root / name, files[name])
    except OSError as error:
        raise ConfigError(f"{error.filename or root}: cannot be written: {error.strerror}") from error
    return Written(created, changed, tuple(n for n in files if n not in (*created, *changed)), stale)


def _writable(root: Path) -> None:
    """Raises ConfigError unless files can be made in the folder, which may not exist yet."""
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root}: is a file, not a folder")
    parent = next(p for p in (root, *root.absolute().parents) if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise ConfigError(f"{parent}: cannot be written: {error.strerror}") from error


def _text(root: Path, name: str) -> str | None:
    """What a file holds now; None when it is not there."""
    path = root / name
    try:
        if path.resolve().is_relative_to(root.resolve()) and not path.is_dir():
            return path.read_bytes().decode("utf-8", "replace")
        raise ConfigError(f"{path}: is a folder or leads out of {root}; nothing is written there")
    except (FileNotFoundError, NotADirectoryError):
        if any(p.exists() and not p.is_dir() for p in path.parents if p != root and p.is_relative_to(root)):
            raise ConfigError(f"{path.parent}: is a file, not a folder") from None
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _stale(root: Path, files: Mapping[str, str]) -> tuple[str, ...]:
    """Files that the manifest in the folder names, that are still there, and that are not written now."""
    try:
        old = Manifest.model_validate_json((root / MANIFEST).read_bytes())
    except (OSError, ValidationError):
        return ()
    return tuple(n for n in sorted(old.files) if n not in files and inside(root, n))


def inside(root: Path, name: str) -> bool:
    """True for a file that is in the folder, not behind a link or .. outside."""
    path = root / name
    return path.is_file() and path.resolve().is_relative_to(root.resolve())


def edited(root: Path, manifest: Manifest) -> tuple[list[str], list[str]]:
    """(files that are missing, files that differ from what was rendered)."""
    missing, changed = [], []
    for name, wanted in manifest.files.items():
        if not inside(root, name):
            missing.append(name)
        elif digest((root / name).read_bytes().decode("utf-8", "replace")) != wanted:
            changed.append(name)
    return missing, changed


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as f:
            f.write(text)
        os.chmod(part, 0o755 if path.suffix == ".sh" else 0o644)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
