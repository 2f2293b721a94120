"""vLLM's log, understood: which step of its start a line shows, and the numbers in it.

The sentences are those of vLLM 0.23 to 0.32 and of vllm-ascend, which logs through the same code. A line that is not
recognised means nothing; the engine's health decides whether it is up, not its log.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

# The prefix "(Worker_TP0 pid=1) INFO 11-22 07:02:31 [loader.py:501] " of a line.
_PREFIX = re.compile(r"^(?:\([^)]*\) )*(?:(?P<level>DEBUG|INFO|WARNING|ERROR) [\d-]+ [\d:.]+ (?:\[[^\]]*\] )?)?")


@dataclass(frozen=True, slots=True)
class Progress:
    """What an engine has said so far; None where it has not. fraction: of the stage, 0 to 1. *_gib: of one worker."""

    stage: str = "starting"
    fraction: float | None = None
    version: str | None = None
    kv_tokens: int | None = None
    kv_gib: float | None = None
    weights_gib: float | None = None
    init_seconds: float | None = None
    running: int = 0
    waiting: int = 0
    tokens_per_second: float = 0.0
    draining: bool = False


_STAGES = (
    (re.compile(r"Resolved architecture: (\S+)"), "reading the configuration of {0}"),
    (re.compile(r"Initializing a V\d LLM engine"), "starting workers"),
    (re.compile(r"Launching vLLM .* headless"), "starting workers"),
    (re.compile(r"world_size=\d+ rank=\d+ local_rank=\d+ distributed_init_method"), "joining the other workers"),
    (re.compile(r"rank \d+ in world size \d+ is assigned as"), "workers joined"),
    (re.compile(r"Starting to load model"), "loading weights"),
    (re.compile(r"Loading weights took"), "weights loaded"),
    (re.compile(r"Model loading took"), "weights loaded"),
    (re.compile(r"Warming up model for the compilation|Dynamo bytecode transform"), "compiling"),
    (re.compile(r"Graph capturing finished"), "graphs captured"),
    (re.compile(r"init engine \(.*\) took"), "starting the server"),
    (re.compile(r"Starting vLLM (?:API )?server"), "starting the server"),
)  # fmt: skip
_BARS = (
    (re.compile(r"Loading \S+ checkpoint shards:\s*(\d+)% "), "loading weights"),
    (re.compile(r"Capturing (?:CUDA|ACL|NPU) graphs?[^:]*:\s*(\d+)%"), "capturing graphs"),
)
_LOAD = re.compile(r"Avg generation throughput: ([\d.]+) tokens/s, Running: (\d+) reqs, Waiting: (\d+) reqs")
_NUMBERS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("version", re.compile(r"\bversion (\d+\.\d+\S*)$|LLM engine \(v([\d.]+\S*?)\)")),
    ("kv_tokens", re.compile(r"KV cache size: ([\d,]+) tokens")),
    ("kv_gib", re.compile(r"Available KV cache memory: ([\d.]+) GiB|Explicitly set \(([\d.]+)/[\d.]+\) GiB for KV")),
    ("weights_gib", re.compile(r"Model loading took ([\d.]+) GiB")),
    ("init_seconds", re.compile(r"init engine \(.*\) took ([\d.]+) s")),
)


def message(line: str) -> tuple[str, str]:
    """(level or "", text) of a log line without the process's name, date and place."""
    found = _PREFIX.match(line)
    assert found is not None  # every part is optional
    return found["level"] or "", line[found.end() :]


def advance(before: Progress, line: str) -> Progress:
    """The progress after one more line; the same object when the line says nothing new."""
    _, text = message(line)
    load = _LOAD.search(text)
    if load:
        rate, running, waiting = float(load[1]), int(load[2]), int(load[3])
        return replace(before, running=running, waiting=waiting, tokens_per_second=rate)
    after = _numbers(before, text)
    if "[shutdown] API server: shutdown triggered" in text and not after.draining:
        after = replace(after, draining=True)
    for pattern, stage in _BARS:
        if bar := pattern.search(text):
            return replace(after, stage=stage, fraction=min(int(bar[1]), 100) / 100)
    for pattern, stage in _STAGES:
        if found := pattern.search(text):
            return replace(after, stage=stage.format(*found.groups()), fraction=None)
    return after


def _numbers(before: Progress, text: str) -> Progress:
    """Several workers say the same; the smallest cache and the largest weights count, as the engine itself decides."""
    after = before
    for name, pattern in _NUMBERS:
        found = pattern.search(text)
        if not found:
            continue
        value = next(g for g in found.groups() if g is not None)
        if name == "version":
            after = replace(after, version=value)
        elif name == "kv_tokens":
            after = replace(after, kv_tokens=int(value.replace(",", "")))
        elif name == "kv_gib":
            after = replace(after, kv_gib=min(float(value), after.kv_gib or float(value)))
        elif name == "weights_gib":
            after = replace(after, weights_gib=max(float(value), after.weights_gib or 0.0))
        else:
            after = replace(after, init_seconds=float(value))
    return after
