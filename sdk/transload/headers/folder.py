"""The tensors of a whole checkpoint: a file, or a folder of shards with or without an index."""

from __future__ import annotations

from pathlib import Path

from transload.errors import FormatError
from transload.headers.gguf import MAGIC, read_gguf_header, split_name
from transload.headers.info import TensorInfo, shown
from transload.headers.jsonfile import read_json
from transload.headers.safetensors import read_safetensors_header

MAIN_FILE = "model.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"


def read_headers(path: str | Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint by name: a .safetensors file, a .gguf file, or a folder of them.

    Raises FormatError for what `checkpoint_files` refuses, index entries for tensors that the shard lacks, and tensors
    that lie in two shards.
    """
    files, index, weight_map = _located(Path(path))
    if is_gguf(files[0]):
        return read_gguf_header(files[0]).tensors
    infos = _merged(files)
    for name, shard in weight_map.items():
        found = infos.get(name)
        if found is None or found.file.name != shard:
            place = "in no shard" if found is None else f"in {found.file.name}"
            raise FormatError(f"{index}: tensor {shown(name)} should be in {shard}, but is {place}")
    return infos


def checkpoint_files(path: str | Path) -> list[Path]:
    """The weight files of a checkpoint: the file itself or, in a folder, every shard; at least one.

    In a folder the index decides which shards belong (model.safetensors.index.json, or the only other
    *.safetensors.index.json); without one it is model.safetensors alone, else every *.safetensors file, else the only
    .gguf file. Raises FormatError when nothing is there, when shards are missing, and when an index entry points
    outside the folder.
    """
    return _located(Path(path))[0]


def _located(path: Path) -> tuple[list[Path], Path | None, dict[str, str]]:
    """Weight files, index and the index's map from tensor to shard (empty without an index)."""
    try:
        if path.is_dir():
            index = find_index(path)
            weight_map = {} if index is None else _weight_map(index)
            return _weight_files(path) if index is None else _shards(index, weight_map), index, weight_map
        if path.is_file():
            return [path], None, {}
    except OSError as e:
        raise FormatError(f"{path}: cannot be read: {e.strerror or e}") from e
    raise FormatError(f"{path}: no such file or folder; a model of a hub is downloaded first, then its folder is given")


def is_gguf(path: Path) -> bool:
    """True when a file is called .gguf or begins with GGUF's magic (files of a cache have no suffix)."""
    if path.suffix == ".gguf":
        return True
    try:
        with path.open("rb") as f:
            return f.read(4) == MAGIC
    except OSError as e:
        raise FormatError(f"{path}: cannot be read: {e.strerror or e}") from e


def find_index(folder: Path) -> Path | None:
    """The index file of a sharded checkpoint, None where there is none. Raises FormatError when two claim the role."""
    main = folder / ("model" + INDEX_SUFFIX)
    if main.is_file():
        return main
    others = sorted(p for p in folder.iterdir() if p.name.endswith(INDEX_SUFFIX))
    if len(others) > 1:
        names = ", ".join(p.name for p in others)
        raise FormatError(f"{folder}: several index files ({names}) and no {main.name}: keep the one that is meant")
    return others[0] if others else None


def _weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder without an index."""
    files = sorted(folder.glob("*.safetensors"))
    ggufs = [p for p in sorted(folder.glob("*.gguf")) if (split_name(p) or ("", 1, 1))[1] == 1]  # of a split: the first
    if folder / MAIN_FILE in files:
        return [folder / MAIN_FILE]
    if files:
        return files
    if len(ggufs) > 1:
        names = ", ".join(p.name for p in ggufs[:5])
        raise FormatError(f"{folder}: {len(ggufs)} GGUF files ({names}): give the path of one of them")
    if not ggufs:
        raise FormatError(f"{folder}: no .safetensors and no .gguf file" + _pickle_advice(folder))
    return ggufs


def _weight_map(index: Path) -> dict[str, str]:
    """The index's map from tensor to shard, every shard a plain file name."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: weight_map is {shown(weight_map)}, expected an object from tensor to file name")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _is_plain_name(shard):
            raise FormatError(
                f"{index}: tensor {shown(name)} is in {shown(shard)}, expected a file name in this folder"
            )
    return weight_map


def _shards(index: Path, weight_map: dict[str, str]) -> list[Path]:
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        some = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise FormatError(
            f"{index.parent}: {len(missing)} of {len(names)} shards named by {index.name} are missing: {some}"
        )
    return [index.parent / name for name in names]


def _is_plain_name(name: str) -> bool:
    """A name inside the folder: no separators, no way up. The file itself may be a link, as in the hub's cache."""
    return bool(name) and name not in (".", "..") and not any(c in name for c in "/\\:\0")


def _merged(files: list[Path]) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for file in files:
        found = read_safetensors_header(file)[0]
        for name in infos.keys() & found.keys():
            raise FormatError(f"{file}: tensor {shown(name)} is also in {infos[name].file.name}")
        infos |= found
    return infos


def _pickle_advice(folder: Path) -> str:
    """What to do when the only weights are pickles, which can run code when they are read."""
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if not pickles:
        return ""
    return (
        f"; {pickles[0]} is a pickle file, which is never read here because it can run code: convert it in a place you "
        "trust with transformers: AutoModelForCausalLM.from_pretrained(SRC).save_pretrained(DST)"
    )
