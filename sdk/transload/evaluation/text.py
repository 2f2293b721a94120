"""The text that a model is measured on: a file, or the docstrings of Python's standard library."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transload.errors import ConfigError

BUILT_IN = "docstrings"

_MODULES = (
    "argparse", "ast", "asyncio", "base64", "bisect", "calendar", "cmath", "codecs", "collections", "configparser",
    "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "doctest", "email", "enum",
    "fractions", "functools", "gettext", "glob", "gzip", "hashlib", "heapq", "html", "http", "inspect", "io",
    "ipaddress", "itertools", "json", "locale", "logging", "math", "mimetypes", "operator", "os", "pathlib", "pickle",
    "pprint", "queue", "random", "re", "sched", "secrets", "shelve", "shutil", "socket", "sqlite3", "statistics",
    "string", "struct", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "trace",
    "types", "typing", "unicodedata", "unittest", "urllib", "uuid", "weakref", "xml", "zipfile",
)  # fmt: skip


def read_text(source: str | Path) -> str:
    """The text of a UTF-8 file, or for "docstrings" the built-in text.

    The built-in text is on every machine and belongs to nobody's training split that we know of, but it changes with
    Python's version: compare numbers of one run. Raises ConfigError for a file that is not there or not text.
    """
    if str(source) == BUILT_IN:
        return "\n\n".join(docstrings())
    try:
        return Path(source).read_text(encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"text '{source}' cannot be read ({e.strerror}): give a text file or '{BUILT_IN}', the built-in text"
        ) from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"text '{source}' is not UTF-8 (byte {e.start}): convert it first") from e


def docstrings() -> Iterator[str]:
    """Every docstring of the chosen modules, their classes, functions and methods, each once, in a fixed order."""
    seen: set[str] = set()
    for name in _MODULES:
        module = importlib.import_module(name)
        for owner in (module, *(value for _, value in sorted(vars(module).items()))):
            members = [owner, *(vars(owner).values() if inspect.isclass(owner) else ())]
            for member in members if owner is module or getattr(owner, "__module__", None) == name else ():
                text = inspect.getdoc(member) if callable(member) or member is module else None
                if text and text not in seen:
                    seen.add(text)
                    yield text


def token_ids(tokenizer: Any, text: str, limit: int) -> Tensor:
    """int64 [T], T at most `limit`. Raises ConfigError for a text with fewer than two tokens."""
    # A prefix of the text is enough: a token is at most a few dozen characters, and long texts are slow to split.
    ids: Tensor = tokenizer(text[: limit * 32], return_tensors="pt")["input_ids"][0][:limit]
    if len(ids) < 2:
        raise ConfigError(f"the text has {len(ids)} tokens, and two are needed to predict one: give a longer text")
    return ids.to(torch.int64)
