"""Better constants from real starts: reads an engine's log and replaces estimates by what it measured.

The lines are those of vLLM 0.32 on CUDA ("Model loading took", "Actual usage is", "Graph capturing finished"), of
vllm-ascend 0.23 ("Loading model weights took", "Actual usage: ... for non-torch memory") and of vLLM on a CPU ("memory
was consumed by non-kv usages", "Checkpoint size"), with "KV cache size" from all of them. Several logs are merged by
the largest value: a plan should hold for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from transload.errors import ConfigError
from transload.plan.catalogue import Constant, default_constants, read_constants
from transload.plan.yamlfile import read_yaml

LARGEST_LOG = 256 << 20
_NUMBER = r"(\d+(?:\.\d+)?)"
_PATTERNS = {
    # vllm-ascend divides by 2**30 and writes GB.
    "loading": re.compile(rf"(?:Model loading took|Loading model weights took) {_NUMBER} Gi?B"),
    "checkpoint": re.compile(rf"Checkpoint size: {_NUMBER} GiB"),
    "not_cache": re.compile(rf"{_NUMBER} GiB memory was consumed by non-kv usages"),
    "not_torch": re.compile(rf"{_NUMBER} GiB for non-torch memory"),
    "consumed": re.compile(rf"Actual usage is {_NUMBER} GiB for consumed memory"),
    "activation": re.compile(rf"{_NUMBER} GiB for peak activation"),
    "graphs": re.compile(
        rf"(?:Graph capturing finished in \d+ secs?, took|CUDA graph pool memory:) {_NUMBER} GiB"
        rf"|{_NUMBER} GiB for NPU graph memory"
    ),
    "available": re.compile(rf"Available KV cache memory: {_NUMBER} GiB|Auto set \({_NUMBER}/"),
    "tokens": re.compile(r"KV cache size: ([\d,]+) tokens"),
    "utilization": re.compile(rf"Desired GPU memory utilization is \({_NUMBER},"),
    "tp": re.compile(r"'tensor_parallel_size': (\d+)"),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What one log says, in GiB (tokens: a count). A missing line is None.

    not_cache: a CPU worker's whole memory before its cache. not_torch: driver, libraries and communicators.
    """

    source: str
    loading: float | None = None
    checkpoint: float | None = None
    not_cache: float | None = None
    not_torch: float | None = None
    consumed: float | None = None
    activation: float | None = None
    graphs: float | None = None
    available: float | None = None
    tokens: float | None = None
    utilization: float | None = None
    tp: float | None = None

    @property
    def beside(self) -> float | None:
        """GiB that are neither weights nor activations nor cache, None when the log does not say."""
        if self.not_torch is not None:
            return self.not_torch
        if self.consumed is not None and self.loading is not None:
            return max(0.0, self.consumed - self.loading)
        if self.not_cache is not None and self.checkpoint is not None:
            return max(0.0, self.not_cache - self.checkpoint / (self.tp or 1))
        return None


def read_log(path: Path) -> Measured:
    """The measurements in one log; of several workers the largest. Raises ConfigError when there are none."""
    try:
        if path.stat().st_size > LARGEST_LOG:
            raise ConfigError(
                f"{path}: larger than {LARGEST_LOG >> 20} MiB; give the part from the start to 'KV cache size'"
            )
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    found = {name: [_number(m) for m in pattern.finditer(text)] for name, pattern in _PATTERNS.items()}
    if not (found["loading"] or found["consumed"] or found["graphs"] or found["not_cache"]):
        raise ConfigError(f"{path}: no line of an engine's start, such as 'Model loading took ... GiB'")
    return Measured(str(path.name), **{name: max(values) for name, values in found.items() if values})


def _number(match: re.Match[str]) -> float:
    """The one group of a pattern's alternatives that matched."""
    return float(next(g for g in match.groups() if g is not None).replace(",", ""))


def calibrated(
    logs: Iterable[Measured], platform: str, base: Mapping[str, Mapping[str, Constant]] | None = None
) -> Mapping[str, Mapping[str, Constant]]:
    """Constants with the measured ones replaced. Activation peaks hold for the model and batch of the log."""
    constants = {name: dict(rows) for name, rows in (base or default_constants()).items()}
    rows = constants[platform]
    for log in logs:
        source = f"measured in {log.source}"
        if log.graphs is not None:
            _raise(rows, "graphs_base", log.graphs, source)
            rows["graphs_per_layer"] = Constant(value="0 B", kind="measured", source=source)
        beside = log.beside
        if beside is not None:
            if (log.tp or 1) <= 1:
                _raise(rows, "context", beside, source)
            else:
                rows["context"] = Constant(value=f"{beside:.3f} GiB", kind="measured", source=source)
                note = f"HCCL: in the context line, {source}" if platform == "ascend" else source
                rows["communicator"] = Constant(value="0 B", kind="measured", source=note)
        if log.activation is not None:
            _raise(rows, "activation_peak", log.activation, source)
    return constants


def _raise(rows: dict[str, Constant], name: str, gib: float, source: str) -> None:
    before = rows.get(name)
    if before is None or before.kind != "measured" or float(str(before.value).split()[0]) < gib:
        rows[name] = Constant(value=f"{gib:.3f} GiB", kind="measured", source=source)


def write_constants(constants: Mapping[str, Mapping[str, Constant]]) -> str:
    """The constants as YAML, in the form of data/constants.yaml."""
    data = {p: {name: c.model_dump() for name, c in rows.items()} for p, rows in constants.items()}
    text: str = yaml.safe_dump(data, sort_keys=False, width=120)
    return text


def load_constants(path: Path) -> Mapping[str, Mapping[str, Constant]]:
    """Constants from a file that `write_constants` wrote; what it lacks comes from the shipped ones."""
    given = read_constants(read_yaml(path))
    return {name: {**rows, **given.get(name, {})} for name, rows in default_constants().items()}
