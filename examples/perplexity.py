"""Perplexity of a checkpoint in several activation schemes over the same text.

    python examples/perplexity.py model.gguf                       # w4a16 and w4a8, 20 000 tokens
    python examples/perplexity.py folder --schemes w4a8 --tokens 5000

The text is what every Python installation has: the docstrings of its standard library, in a fixed order. It is cut into
windows that do not overlap, so every window starts without context; compare schemes with each other, not with published
numbers. `transload eval` measures more, with windows that overlap.
"""

from __future__ import annotations

import argparse
import math
import time

import torch

import transload
from transload.evaluation.text import docstrings
from transload.runtime import report, tokenizer


def perplexity(model: torch.nn.Module, ids: torch.Tensor, window: int) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each window. ids: int64 [T]."""
    total, count = 0.0, 0
    for piece in ids.split(window):
        if len(piece) < 2:
            continue
        with torch.inference_mode():
            logits = model(piece.unsqueeze(0)).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
        count += len(piece) - 1
    return math.exp(total / count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("path")
    parser.add_argument("--schemes", nargs="+", default=["w4a16", "w4a8"])
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    ids = tokenizer(options.path)("\n\n".join(docstrings()), return_tensors="pt")["input_ids"][0][: options.tokens]
    first: float | None = None
    for scheme in options.schemes:
        model = transload.load(options.path, options.device, scheme)
        kernels = sorted({f"{m.kernel} {m.executed}" for m in report(model).modules if m.kind != "embedding"})
        start = time.perf_counter()
        value = perplexity(model, ids.to(model.device), options.window)
        first = first or value
        speed = len(ids) / (time.perf_counter() - start)
        print(
            f"{scheme}: perplexity {value:.4f} ({value / first - 1:+.2%}) over {len(ids)} tokens, {speed:.0f} tokens/s"
        )
        print(f"  kernels: {', '.join(kernels)}", flush=True)
        del model


if __name__ == "__main__":
    main()
