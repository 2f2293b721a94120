"""An embedding whose rows are stored quantized and become floats when they are looked up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transload import bits
from transload.errors import FormatError
from transload.quant import QTensor
from transload.runtime.gather import Weight
from transload.runtime.placement import Target
from transload.runtime.weight import AnyWeight


class RowStore(nn.Module):
    """Quantized rows in a layout of their own: codes packed row by row, scales, zeros and mins beside them."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    mins: Tensor | None

    def __init__(self, w: QTensor, device: torch.device) -> None:
        super().__init__()
        w = w.with_act(None)
        self.spec, self.k = w.spec, w.k
        parts = {"codes": bits.pack(w.codes, w.spec.bits), "scales": w.scales, "zeros": w.zeros, "mins": w.mins}
        for name, tensor in parts.items():
            self.register_buffer(name, None if tensor is None else tensor.to(device))
        self._g_idx = w.g_idx
        self._is_hf_initialized = True

    def rows(self, index: Tensor) -> QTensor:
        """The rows `index` (int64 [R]) as a quantized weight [R, K]."""
        codes = bits.unpack(self.codes[index], self.spec.bits, self.k)
        zeros, mins = (None if t is None else t[index] for t in (self.zeros, self.mins))
        return QTensor(self.spec, codes, self.scales[index], zeros, mins, self._g_idx)

    def qtensor(self) -> QTensor:
        """The exact numbers that were stored."""
        return self.rows(torch.arange(len(self.codes), device=self.codes.device))


class QuantEmbedding(nn.Module):
    """Stands in for nn.Embedding. The rows come from a store of its own, or from the packed weight of a tied head."""

    table: RowStore | AnyWeight | None

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.dtype = dtype
        self.register_module("table", None)
        self.tied = False  # True: the numbers belong to another module, which saves them

    def fill(self, member: str, w: Weight, to: Target) -> None:
        """Stores the rows for lookup. Raises FormatError when the shape is not the model's."""
        if (w.n, w.k) != (self.num_embeddings, self.embedding_dim):
            raise FormatError(f"the embedding is {(w.n, w.k)}, expected {(self.num_embeddings, self.embedding_dim)}")
        if not isinstance(w, QTensor):
            raise FormatError("the embedding's rows are of several schemes")
        self.table = RowStore(w, to.torch_device)

    def forward(self, index: Tensor) -> Tensor:
        """index: int [...] -> [..., embedding_dim] in the model's dtype."""
        rows = self.table.rows(index.reshape(-1))  # type: ignore[union-attr]
        return rows.dequantize().to(self.dtype).reshape(*index.shape, self.embedding_dim)

    def weight_shape(self, member: str = "weight") -> tuple[int, ...]:
        """(N, K)."""
        return self.num_embeddings, self.embedding_dim

    def qtensor(self, member: str = "weight") -> Weight:
        """The exact numbers of the table."""
        return self.table.qtensor()  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        """Shape and what the rows are stored in."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
