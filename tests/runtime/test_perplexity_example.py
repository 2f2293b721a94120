"""examples/perplexity.py: its text is long enough, and its number is the one of the definition."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny_models import make

SCRIPT = Path(__file__).parents[2] / "examples" / "perplexity.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("perplexity_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_text_is_fixed_and_long_enough_for_twenty_thousand_tokens(example: ModuleType) -> None:
    text = "\n\n".join(example.docstrings())
    assert text == "\n\n".join(example.docstrings())
    assert len(text) > 20_000 * 6  # tokens of English text are about four characters long


def test_perplexity_is_the_exponential_of_the_mean_loss_of_each_window(example: ModuleType, tmp_path: Path) -> None:
    model, ids = make("llama", tmp_path), torch.arange(20) % 96
    losses = []
    for window in (ids[:8], ids[8:16], ids[16:]):
        with torch.no_grad():
            scores = model(window.unsqueeze(0)).logits[0].log_softmax(-1)
        losses += [-float(scores[i, window[i + 1]]) for i in range(len(window) - 1)]
    assert example.perplexity(model, ids, 8) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
