"""JSON objects from foreign files: bounded, and every failure a FormatError that names the file."""

from __future__ import annotations

import json
from pathlib import Path

from transload.errors import FormatError

MAX_JSON = 100_000_000  # bytes; the index of 100 000 tensors has about 10 million


def read_json(path: str | Path) -> dict[str, object]:
    """The JSON object in a file.

    Raises FormatError when the file is missing, unreadable, larger than 100 MB, not UTF-8 JSON, or not an object.
    """
    path = Path(path)
    try:
        with path.open("rb") as f:
            data = f.read(MAX_JSON + 1)
    except OSError as e:
        raise FormatError(f"{path}: cannot be read: {e.strerror or e}") from e
    if len(data) > MAX_JSON:
        raise FormatError(f"{path}: larger than {MAX_JSON} bytes, too large for a JSON file of a checkpoint")
    value = parse_json(data, str(path))
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_json(data: bytes, where: str, unique: bool = True) -> object:
    """The JSON value in UTF-8 bytes. unique: a key that occurs twice in one object is refused.

    Raises FormatError beginning with `where`.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_unique if unique else None)
    except UnicodeDecodeError as e:
        raise FormatError(f"{where}: not UTF-8: byte {e.start} is 0x{data[e.start]:02x}") from e
    except RecursionError as e:
        raise FormatError(f"{where}: JSON nested too deeply") from e
    except ValueError as e:
        raise FormatError(f"{where}: not valid JSON: {e}") from e


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:120]!a} occurs twice in one object")
            seen.add(key)
    return found
