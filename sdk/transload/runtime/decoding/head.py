"""Output heads that stayed in float: few tokens through the kernel, in the width of the checkpoint.

A head is read whole for every token, and in small models it is most of what is read. Activations are float32 on the
CPU, and transformers widens a checkpoint's bfloat16 or float16 weights to them; here they go back, which loses nothing,
and are multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from transload.hal import Kernel
from transload.runtime.tied import forget_tie
from transload.runtime.weight import PackedWeight

_NARROW = (torch.bfloat16, torch.float16)
_FEW = 16  # tokens up to which the kernel is faster than torch; measured, 152000 x 896 with AVX512
_OUTPUTS = 1024  # that are widened together where more tokens are multiplied


class FloatHead(nn.Linear):
    """Stands in for an output head [N, K] and shares its weight, or has a narrower one as a buffer."""

    def __init__(self, head: nn.Linear, kernel: Kernel, narrow: Tensor | None = None, tied: bool = False) -> None:
        """tied: the embedding saves the narrow numbers."""
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.kernel, self.bias = kernel, head.bias
        if narrow is None:
            self.weight = head.weight
        else:
            del self.weight
            self.register_buffer("weight", narrow, persistent=not tied)
        self.train(head.training)

    def forward(self, x: Tensor) -> Tensor:
        """x: float [..., K] -> [..., N] in x's dtype."""
        w, bias, rows = self.weight, None if self.bias is None else self.bias.to(x.dtype), x.numel() // self.in_features
        if torch.is_grad_enabled() and (x.requires_grad or w.requires_grad):
            return functional.linear(x, w.to(x.dtype), bias)
        if 0 < rows <= _FEW and self._suits(x, w):
            few = x.detach().to(torch.float32).reshape(rows, -1).contiguous()
            y = self.kernel.float_product(few, w.detach()).to(x.dtype)
        elif w.dtype == x.dtype or torch.compiler.is_compiling():
            return functional.linear(x, w.to(x.dtype), bias)
        else:
            y = _widened_product(x.reshape(rows, -1), w)
        return (y if bias is None else y + bias).reshape(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FloatHead:
        """A narrow weight moves but is never cast: it would get wider, or lose digits."""
        super()._apply(_moved(fn) if "weight" in self._buffers else fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _suits(self, x: Tensor, w: Tensor) -> bool:
        """Whether everything is where the kernel reads it."""
        return x.device.type == w.device.type == "cpu" and w.dtype in self.kernel.float_dtypes and w.is_contiguous()


class NarrowEmbedding(nn.Module):
    """Stands in for the embedding that a narrow head is tied to. dtype: of the activations."""

    weight: Tensor

    def __init__(self, embedding: nn.Embedding, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.dtype = embedding.padding_idx, embedding.weight.dtype
        self.register_buffer("weight", weight)
        self.train(embedding.training)

    def forward(self, index: Tensor) -> Tensor:
        """index: int [...] -> [..., embedding_dim] in the model's dtype."""
        return functional.embedding(index, self.weight).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NarrowEmbedding:
        """Casts what comes out, and leaves the numbers as they are."""
        super()._apply(_moved(fn), recurse)  # type: ignore[no-untyped-call]
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self

    def extra_repr(self) -> str:
        """Shape and width."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.weight.dtype}"


def _moved(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`fn` without what it does to the dtype."""

    def move(t: Tensor) -> Tensor:
        out = fn(t)
        return out if out.dtype == t.dtype else t.to(out.device)

    return move


def take_head(model: PreTrainedModel) -> None:
    """Puts a FloatHead in the place of a quantized model's float head, where the kernel of its weights has a product.

    The head, and an embedding tied to it, become as narrow as their numbers allow. Nothing is rounded.
    """
    head: nn.Module | None = None
    with suppress(NotImplementedError):  # transformers' answer for models that have no output head
        head = model.get_output_embeddings()
    kernel = next((m.kernel for m in model.modules() if isinstance(m, PackedWeight)), None)
    if type(head) is not nn.Linear or kernel is None or not kernel.float_dtypes or head.weight.device.type != "cpu":
        return
    embedding = model.get_input_embeddings()
    tied = getattr(embedding, "weight", None) is head.weight
    narrow = _narrow(head.weight.detach(), kernel) if not tied or type(embedding) is nn.Embedding else None
    if narrow is not None and tied:
        ties = model.all_tied_weights_keys
        for target in [t for t in ties if model.get_parameter(t) is head.weight]:
            del ties[target]
            forget_tie(model, target)
        model.set_input_embeddings(NarrowEmbedding(cast(nn.Embedding, embedding), narrow))
    model.set_output_embeddings(FloatHead(head, kernel, narrow, tied))


def _widened_product(x: Tensor, w: Tensor) -> Tensor:
    """x [M, K] times w [N, K] in x's dtype, some outputs at a time in memory that stays in the cache: [M, N]."""
    y, room = x.new_empty(len(x), len(w)), x.new_empty(min(_OUTPUTS, len(w)), w.shape[1])
    for first in range(0, len(w), _OUTPUTS):
        part = w[first : first + _OUTPUTS]
        y[:, first : first + len(part)] = x @ room[: len(part)].copy_(part).T
    return y


def _narrow(weight: Tensor, kernel: Kernel) -> Tensor | None:
    """The same numbers in 16 bits; None where they are so already, or no type holds them."""
    if weight.dtype != torch.float32:
        return None
    for dtype in _NARROW:
        if dtype in kernel.float_dtypes and all(_holds(dtype, rows) for rows in torch.split(weight, _OUTPUTS)):
            return weight.to(dtype)
    return None


def _holds(dtype: torch.dtype, w: Tensor) -> bool:
    return torch.equal(w.to(dtype).to(w.dtype), w)
