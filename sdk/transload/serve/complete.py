"""Whether a checkpoint's layers have the same tensors: vLLM 0.32 serves a quantized one that lacks some, with
values of its own in their place.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from transload.errors import FormatError
from transload.headers import read_headers

_LAYER = re.compile(r"(.*?\blayers)\.(\d+)\.(.+)")


def check_complete(path: Path) -> None:
    """Raises FormatError when a single layer lacks tensors that all others of its kind have.

    A layer is judged when no other one has the same tensors, and at least two others have these and more. Kinds of
    layers (dense and sparse, full and linear attention) have several members each, and are not taken for damage.
    """
    if not path.is_dir() or not any(path.glob("*.safetensors")):
        return
    layers: dict[tuple[str, int], set[str]] = {}
    for name in read_headers(path):
        found = _LAYER.fullmatch(name)
        if found:
            layers.setdefault((found[1], int(found[2])), set()).add(found[3])
    kinds = Counter(frozenset(tensors) for tensors in layers.values())
    for (stack, number), tensors in sorted(layers.items()):
        if kinds[frozenset(tensors)] > 1:
            continue
        fuller = [kind for kind, count in kinds.items() if count > 1 and tensors < kind]
        if fuller:
            lacking = sorted(min(fuller, key=len) - tensors)
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise FormatError(
                f"{path}: {stack}.{number} lacks {', '.join(lacking[:3])}{more}, which other layers have; the engine "
                "would not notice and serve another model. Get the missing files, or port it again"
            )
