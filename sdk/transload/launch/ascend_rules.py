"""Combinations that vllm-ascend 0.23 refuses at its start, after minutes of loading (ascend_config.py of its wheel)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

_SIZES = ("tensor-parallel-size", "pipeline-parallel-size", "data-parallel-size")


def contradictions(argv: Sequence[str], env: Mapping[str, str]) -> list[str]:
    """What in --additional-config contradicts the sizes and variables of a command; empty when nothing does.

    argv is what follows `vllm serve`, with an option and its value as two words. Malformed JSON is not judged here.
    """
    config = _config(argv)
    tp, pp, dp = (_size(argv, f"--{name}") for name in _SIZES)
    found = _fine_grained(config.get("finegrained_tp_config"), tp, dp)
    if _section(config, "profiling_chunk_config").get("enabled") and pp == 1:
        found.append("profiling_chunk_config needs --pipeline-parallel-size above 1")
    dynamic = _section(config, "eplb_config").get("dynamic_eplb")
    if dynamic and not any(
        env.get(name, "").lower() in ("true", "1") for name in ("DYNAMIC_EPLB", "EXPERT_MAP_RECORD")
    ):
        found.append("eplb_config.dynamic_eplb needs the variable DYNAMIC_EPLB=true (--env DYNAMIC_EPLB=true)")
    return [f"--additional-config: {text}" for text in found]


def _fine_grained(config: object, tp: int, dp: int) -> list[str]:
    sizes = config if isinstance(config, dict) else {}
    found = []
    for name, size in sizes.items():
        if isinstance(size, int) and size > 0 and dp % size:
            found.append(f"{name} {size} must divide --data-parallel-size {dp}")
    if sizes.get("oproj_tensor_parallel_size", 0) and tp > 1:
        found.append(f"oproj_tensor_parallel_size needs --tensor-parallel-size 1, found {tp}")
    return found


def _config(argv: Sequence[str]) -> dict[str, Any]:
    if "--additional-config" not in argv[:-1]:
        return {}
    try:
        value = json.loads(argv[argv.index("--additional-config") + 1])
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _size(argv: Sequence[str], option: str) -> int:
    text = argv[argv.index(option) + 1] if option in argv[:-1] else "1"
    return int(text) if text.isdecimal() else 1
