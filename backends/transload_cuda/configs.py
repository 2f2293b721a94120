"""Tile sizes of the Triton kernels: measured ones for a device where there are some, otherwise a sensible default.

Order of precedence: what `tune` found on this machine (a file in the user's cache), what is shipped in `measured.py`
for a device of this name, the default. All of them are cut to what the weight's groups and the chip's shared memory
allow, so that an entry can make a product slower but never wrong.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from transload_cuda.measured import MEASURED

STEP_A16, STEP_A8 = 16, 32  # inputs that one tensor-core step sums: 16-bit and 8-bit operands

# Shared memory that one block may ask for, bytes, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications per compute capability). Unknown ones are taken for the smallest.
SHARED_BYTES = {80: 166_912, 87: 166_912, 90: 232_448, 100: 232_448, 103: 232_448}
SMALL_SHARED_BYTES = 101_376  # 8.6, 8.9, 12.x


@dataclass(frozen=True, slots=True)
class Config:
    """Tile of one program: block_m rows, block_n outputs, block_k bytes of codes; K is cut into splits parts."""

    block_m: int
    block_n: int
    block_k: int
    warps: int = 4
    stages: int = 3
    splits: int = 1

    def shared_bytes(self, x_bytes: int, lanes: int) -> int:
        """Bytes that the pipeline keeps in flight: codes once, activations once a lane."""
        return self.stages * self.block_k * (self.block_n + lanes * x_bytes * self.block_m)


@dataclass(frozen=True, slots=True)
class Ask:
    """What a configuration depends on. arch: compute capability times ten; rows: M, or rows an expert in the mean."""

    scheme: str  # a16 or a8
    rows: int
    n: int
    width: int  # bytes in a packed row
    lanes: int
    segment: int  # inputs that share scales, 0 for all
    x_bytes: int  # bytes of an activation
    arch: int
    multiprocessors: int
    tiles_of_rows: int | None = None  # of experts; None for a plain linear

    @property
    def bucket(self) -> int:
        """Rows rounded up to a power of two, 8 to 256: products of one bucket share a configuration."""
        return min(max(8, 1 << max(self.rows - 1, 0).bit_length()), 256)

    @property
    def key(self) -> str:
        """The name of the entry in a table of measured configurations."""
        return f"{self.scheme} b{8 // self.lanes} g{self.segment} m{self.bucket} n{self.n} w{self.width}"


def find(ask: Ask, device_name: str) -> Config:
    """The configuration to run with."""
    return fitted(tuned(device_name).get(ask.key) or _shipped(ask, device_name) or default(ask), ask)


def default(ask: Ask) -> Config:
    """A configuration that is reasonable on any tensor-core GPU since Ampere; chosen by its machine code, not measured.

    Two warps take each weight through the oldest tensor-core instruction everywhere, whose operand Triton unpacks in
    place: with few rows that is half the instructions of a warp group's. With many rows of W4A8, twice the inputs
    between two scalings are a third fewer instructions.
    """
    deep = 4 if ask.arch >= 90 else 3
    if ask.bucket <= 32:
        base = Config(ask.bucket, 64, 128, 2, deep)
    elif ask.bucket <= 64:
        base = Config(64, 128, 64, 8, deep)
    else:
        base = Config(128, 128, 64, 8, deep) if ask.scheme == "a16" else Config(128, 128, 128, 8, 3)
    return replace(base, splits=_splits(base, ask))


def fitted(config: Config, ask: Ask) -> Config:
    """The configuration with blocks that stay inside a segment, and no more stages than shared memory holds."""
    unit = ask.segment or ask.width
    block_k = min(config.block_k, unit & -unit, ask.width & -ask.width)  # the largest powers of two that divide them
    config = replace(config, block_k=block_k, splits=max(1, min(config.splits, ask.width // block_k)))
    limit = SHARED_BYTES.get(ask.arch, SMALL_SHARED_BYTES)
    while config.stages > 1 and config.shared_bytes(ask.x_bytes, ask.lanes) > limit:
        config = replace(config, stages=config.stages - 1)
    return config


FEW_ROWS = ((32, 128, 2), (64, 64, 2), (64, 128, 2), (64, 128, 4), (128, 128, 2), (128, 128, 4))  # n, k, warps
MANY_ROWS = ((64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 8))


def candidates(ask: Ask) -> tuple[Config, ...]:
    """What `tune` tries, some thirty: every one of them fits."""
    few, usual = ask.bucket <= 32, default(ask).splits
    found = {
        fitted(Config(m, n, k, warps, stages, splits), ask): None
        for n, k, warps in (FEW_ROWS if few else MANY_ROWS)
        for m in ((ask.bucket,) if few else sorted({64, min(ask.bucket, 128)}))
        for stages in (3, 4)
        for splits in (sorted({max(1, usual // 2), usual, 2 * usual}) if few else (1,))
    }
    return tuple(found)


def _splits(config: Config, ask: Ask) -> int:
    """Parts of K: as many as give every multiprocessor eight warps, each part at least two blocks long."""
    rows = ask.tiles_of_rows or -(-max(ask.rows, 1) // config.block_m)
    tiles = rows * -(-ask.n // config.block_n)
    if ask.bucket > 32:
        return 1
    longest = max(1, ask.width // (2 * config.block_k))
    return max(1, min(8 * ask.multiprocessors // (config.warps * max(tiles, 1)), longest, 16))


def _shipped(ask: Ask, device_name: str) -> Config | None:
    for name, entries in MEASURED.items():
        if name == device_name and ask.key in entries:
            return Config(*entries[ask.key])
    return None


def cache_file(device_name: str) -> Path:
    """Where `tune` keeps its findings: $TRANSLOAD_CACHE/cuda/<device>.json, ~/.cache/transload by default."""
    root = os.environ.get("TRANSLOAD_CACHE") or str(Path.home() / ".cache" / "transload")
    safe = "".join(c if c.isalnum() else "_" for c in device_name)
    return Path(root) / "cuda" / f"{safe}.json"


@cache
def tuned(device_name: str) -> dict[str, Config]:
    """The findings of `tune` for a device, by Ask.key; empty where there is no file or it cannot be read."""
    try:
        stored = json.loads(cache_file(device_name).read_text())
        return {key: Config(**entry) for key, entry in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def remember(device_name: str, key: str, config: Config) -> Path:
    """Adds a finding to the user's cache file, atomically, and returns the file."""
    path = cache_file(device_name)
    tuned.cache_clear()
    entries = {**tuned(device_name), key: config}
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps({name: asdict(entry) for name, entry in entries.items()}, indent=1, sort_keys=True))
    draft.replace(path)
    tuned.cache_clear()
    return path


def as_measured(device_name: str) -> str:
    """The findings of `tune` for a device as an entry of `measured.MEASURED`.

    >>> as_measured("no such device")
    '    "no such device": {\\n    },\\n'
    """
    lines = [f'        "{key}": {tuple(asdict(found).values())},' for key, found in sorted(tuned(device_name).items())]
    return "\n".join((f'    "{device_name}": {{', *lines, "    },", ""))
