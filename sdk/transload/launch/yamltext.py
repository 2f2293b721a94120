"""YAML with comments: PyYAML writes the data, and keys that begin with '# ' become comment lines above what follows."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import yaml

from transload.launch.words import commented

_WIDTH = 100  # YAML writes keys up to 128 characters on one line
_COMMENT = re.compile(r"^(?P<indent>[ ]*)(?P<quote>['\"]?)# (?P<text>.*?)(?P=quote): null$", re.MULTILINE)


class Flow(list[object]):
    """A list that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """Lists are indented under their key, texts of several lines are written as blocks, nothing is an alias."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text and text.isprintable() is False and _plain_lines(text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _plain_lines(text: str) -> bool:
    """True for a text that a literal block holds unchanged: printable lines without blanks at their ends."""
    lines = text.split("\n")
    return all(line.isprintable() and line == line.rstrip() for line in lines) and not text.startswith((" ", "\n"))


def _flow(dumper: _Dumper, items: Flow) -> yaml.SequenceNode:
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=True)


_Dumper.add_representer(str, _text)
_Dumper.add_representer(Flow, _flow)


def remark(*lines: str) -> dict[str, object]:
    """Keys that become comment lines, for use as {**remark("why"), "key": value}; long ones are wrapped."""
    return {f"# {part}": None for line in lines for part in textwrap.wrap(line, _WIDTH)}


def document(data: object, head: Sequence[str] = ()) -> str:
    """One YAML document with comment lines before it."""
    text = yaml.dump(
        data, Dumper=_Dumper, sort_keys=False, width=1 << 20, allow_unicode=False, default_flow_style=False
    )
    text = _COMMENT.sub(lambda m: f"{m['indent']}# {_unescaped(m['text'], m['quote'])}", text)
    return commented(head) + text


def _unescaped(text: str, quote: str) -> str:
    return text.replace("''", "'") if quote == "'" else text


def documents(items: Sequence[object], head: Sequence[str] = ()) -> str:
    """Several documents in one file."""
    return commented(head) + "---\n".join(document(item) for item in items)
