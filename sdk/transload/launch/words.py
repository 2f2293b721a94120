"""The words that rendered files share: headers, one-line texts, names that every format accepts."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

from transload.launch.topology import Instance
from transload.plan.result import Plan
from transload.plan.units import show_bytes


def one_line(text: str, limit: int = 160) -> str:
    """A text for a comment: control characters and line breaks become blanks."""
    return re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+", " ", text).strip()[:limit]


def slug(text: str, limit: int = 40) -> str:
    """A text as a DNS label: lower-case letters, digits and '-', beginning with a letter."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:limit].strip("-")
    return plain if plain[:1].isalpha() else f"m-{plain}".strip("-")


def shape_words(instance: Instance) -> str:
    """TP 8, PP 2, EP: what is more than one."""
    size = instance.parallelism
    named = (("TP", size.tp), ("PP", size.pp), ("DP", size.dp), ("DCP", size.dcp))
    words = [f"{name} {n}" for name, n in named if n > 1 or name == "TP"]
    return ", ".join([*words, "EP"] if size.ep else words)


def numbers(devices: Sequence[int]) -> str:
    """Device numbers, runs shortened: 0-7, or 2, 0."""
    ascending = list(devices) == list(range(devices[0], devices[0] + len(devices)))
    return f"{devices[0]}-{devices[-1]}" if ascending and len(devices) > 2 else ", ".join(map(str, devices))


def title(plan: Plan) -> str:
    """One line: model, recipe, cluster."""
    return f"{one_line(plan.model, 80)} ({one_line(plan.recipe, 60)}) on {one_line(plan.cluster, 60)}"


def header(plan: Plan, about: str) -> list[str]:
    """The first lines of a rendered file, without comment signs."""
    return [
        title(plan),
        about,
        "Rendered by transload from plan.json. Change the plan and render again rather than editing.",
    ]


def memory_words(instance: Instance) -> str:
    """What the fullest device of an instance holds, as the plan counts it."""
    stage = max(instance.plan.stages, key=lambda s: sum(line.size for line in s.lines))
    sums = {group: sum(x.size for x in stage.lines if x.group == group) for group in ("weights", "kv")}
    rest = sum(x.size for x in stage.lines if x.group not in sums)
    return (
        f"a device of {show_bytes(stage.total)} holds {show_bytes(sums['weights'])} of weights, "
        f"{show_bytes(sums['kv'])} of KV cache and {show_bytes(rest)} of buffers"
    )


def engine_words(instance: Instance) -> str:
    """engine-0: vllm==0.32, TP 8 on 8 x H100, 131072 KV tokens."""
    d = instance.plan
    count = sum(len(part.devices) for part in instance.parts)
    return (
        f"engine-{instance.number}: {d.engine}, {shape_words(instance)} on {count} x {one_line(d.device, 60)}, "
        f"{d.kv_tokens} KV tokens"
    )


def commented(lines: Sequence[str]) -> str:
    """Lines as comments, long ones wrapped and indented."""
    wrapped = [part for line in lines for part in (_wrapped(line) or [""])]
    return "".join(f"# {line}".rstrip() + "\n" for line in wrapped)


def _wrapped(line: str) -> list[str]:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.wrap(line, 117, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def options(argv: Sequence[str]) -> list[str]:
    """Arguments with one item an option, --port=8000, so that a changed value is one changed line of a file."""
    out: list[str] = []
    for word in argv:
        if out and out[-1].startswith("--") and "=" not in out[-1] and not word.startswith("--"):
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out
