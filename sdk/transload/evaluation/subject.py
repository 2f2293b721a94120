"""What there is to say about a loaded model apart from its quality: kernels, bytes and speed."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from transload.evaluation.measures import perplexity, standard_error
from transload.evaluation.reader import Reader
from transload.evaluation.result import Subject
from transload.runtime import report

_WRITTEN = 33  # tokens; the first belongs to the prompt


@dataclass(frozen=True, slots=True)
class About:
    """A model before its quality is known. reader: has read, or will read, the text."""

    path: str
    format: str
    scheme: str
    kernels: tuple[str, ...]
    nbytes: int
    written: float | None
    reader: Reader

    def subject(self, loss: Tensor) -> Subject:
        """With the losses of all scored tokens, float32 [T], everything is known."""
        value = perplexity(loss)
        read = self.reader.tokens / max(self.reader.seconds, 1e-9)
        error = value * standard_error(loss)
        return Subject(self.path, self.format, self.scheme, self.kernels, self.nbytes, value, error, read, self.written)


def about(model: PreTrainedModel, path: str, format: str) -> About:
    """Looks at a loaded model, and lets it write a few tokens for its speed."""
    ran = report(model)
    modules = [m for m in ran.modules if m.kind != "embedding"]
    counts = Counter(f"{m.executed} {m.kernel}" for m in modules)
    scheme = " and ".join(sorted({m.executed for m in modules})) or str(model.dtype).removeprefix("torch.")
    if any("static" in note for m in modules for note in m.notes):
        scheme += " (static scales not used)"
    kernels = tuple(f"{count} x {name}" for name, count in counts.most_common())
    nbytes = ran.quantized_bytes + ran.float_bytes
    return About(path, format, scheme, kernels, nbytes, _write_speed(model), Reader(model))


def _write_speed(model: PreTrainedModel) -> float | None:
    """Tokens per second of greedy generation after a short prompt; None for a model that does not generate."""
    if not model.can_generate():
        return None
    ids = torch.arange(8, device=model.device).unsqueeze(0)
    seconds = []
    for count in (1, 1, _WRITTEN):  # the first warms up
        settings = GenerationConfig(max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0)
        start = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        seconds.append(time.perf_counter() - start)
    return (_WRITTEN - 1) / max(seconds[2] - seconds[1], 1e-9)
