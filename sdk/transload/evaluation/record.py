"""What a source model says about every scored token, kept so that the source itself need not stay in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from transload.evaluation.reader import Layers, Reader
from transload.evaluation.windows import Window

Done = Callable[[int], None]  # called with the number of tokens that were scored


class Record:
    """Hidden states of all scored tokens, and of every layer for the first `layer_tokens` of them.

    A model that is more than a head behind its hidden states stays loaded and reads again.
    """

    def __init__(self, reader: Reader, windows: Sequence[Window], layer_tokens: int, done: Done) -> None:
        self._reader, self._windows = reader, windows
        self._hidden: list[Tensor] = []
        self.layers: list[Layers] = []  # of the first windows
        for window in windows if reader.exact_head else windows[:1]:
            hidden, layers = reader.read(window, layer_tokens)
            layer_tokens = max(layer_tokens - window.scored, 0)
            if layers:
                self.layers.append(layers)
            if reader.exact_head:
                self._hidden.append(hidden.cpu())
            done(window.scored)
        if reader.exact_head:
            reader.forget_layers()

    def logits(self, index: int) -> Iterator[Tensor]:
        """Logits of the scored tokens of a window, [CHUNK, V] at a time."""
        hidden = self._hidden[index] if self._hidden else self._reader.read(self._windows[index])[0]
        return self._reader.logits(hidden)
