"""Better constants from real starts: reads an engine's log and replaces estimates by what it measured.

The lines are those of vLLM 0.32 ("Model loading took", "Actual usage is", "Graph capturing finished", "Available KV
cache memory", "KV cache size"). Several logs are merged by the largest value: a plan should hold for all of them.
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
    "loading": re.compile(rf"Model loading took {_NUMBER} GiB"),
    "consumed": re.compile(rf"Actual usage is {_NUMBER} GiB for consumed memory"),
    "activation": re.compile(rf"{_NUMBER} GiB for peak activation"),
    "graphs": re.compile(rf"(?:Graph capturing finished in \d+ secs?, took|CUDA graph pool memory:) {_NUMBER} GiB"),
    "available": re.compile(rf"Available KV cache memory: {_NUMBER} GiB"),
    "tokens": re.compile(r"KV cache size: ([\d,]+) tokens"),
    "utilization": re.compile(rf"Desired GPU memory utilization is \({_NUMBER},"),
    "tp": re.compile(r"'tensor_parallel_size': (\d+)"),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """What one log says, in GiB (tokens: a count). A missing line is None."""

    source: str
    loading: float | None = None
    consumed: float | None = None
    activation: float | None = None
    graphs: float | None = None
    available: float | None = None
    tokens: float | None = None
    utilization: float | None = None
    tp: float | None = None


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
    found = {name: [float(x.replace(",", "")) for x in p.findall(text)] for name, p in _PATTERNS.items()}
    if not (found["loading"] or found["consumed"] or found["graphs"]):
        raise ConfigError(f"{path}: no line of an engine's start, such as 'Model loading took ... GiB'")
    return Measured(str(path.name), **{name: max(values) for name, values in found.items() if values})


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
        if log.consumed is not None and log.loading is not None:
            beside = max(0.0, log.consumed - log.loading)
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
