"""An embedding whose rows are stored quantized and become floats when they are looked up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transload import bits
from transload.errors import FormatError
from transload.quant import QTensor
from transload.runtime.below import KeptWeight
from transload.runtime.gather import SplitRows, Weight
from transload.runtime.kept import ROWS, KeptPart
from transload.runtime.placement import Target
from transload.runtime.weight import AnyWeight

_SIDES = ("codes", "scales", "zeros", "mins")


class RowStore(nn.Module):
    """Quantized rows in a layout of their own: codes packed row by row, scales, zeros and mins beside them."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    mins: Tensor | None

    def __init__(self, w: QTensor | KeptPart, device: torch.device) -> None:
        super().__init__()
        self.spec, self.k = w.spec.weights_only(), w.k
        if isinstance(w, QTensor):
            parts = {"codes": bits.pack(w.codes, w.spec.bits), "scales": w.scales, "zeros": w.zeros, "mins": w.mins}
            self._g_idx = w.g_idx
        else:
            parts = {name: w.tensors.get(name) for name in _SIDES}
            self._g_idx = None
        for name, tensor in parts.items():
            self.register_buffer(name, None if tensor is None else tensor.to(device))
        self._is_hf_initialized = True

    @staticmethod
    def check(part: KeptPart) -> None:
        """Raises FormatError when the tensors are not those of such rows."""
        blank = part.blank()
        wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]]
        wanted = {"codes": (torch.uint8, (part.n, bits.packed_len(part.k, part.spec.bits)))}
        sides = {"scales": blank.scales, "zeros": blank.zeros, "mins": blank.mins}
        wanted |= {name: (side.dtype, tuple(side.shape)) for name, side in sides.items() if side is not None}
        found = {name: (t.dtype, tuple(t.shape)) for name, t in part.tensors.items()}
        if part.layout != ROWS or part.experts is not None or part.spec.act_order or found != wanted:
            raise FormatError(f"the rows are {found} in layout {part.layout}, expected {wanted} in {ROWS}")

    def kept(self) -> KeptPart | None:
        """The rows as they may be written to a file; None with act-order."""
        tensors = {name: t for name in _SIDES if (t := getattr(self, name)) is not None}
        if self._g_idx is not None:
            return None
        return KeptPart(self.spec, len(self.codes), self.k, None, ROWS, tensors)

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

    def fill(self, member: str, w: Weight | KeptWeight, to: Target) -> None:
        """Stores the rows for lookup. Raises FormatError when the shape is not the model's."""
        if (w.n, w.k) != (self.num_embeddings, self.embedding_dim):
            raise FormatError(f"the embedding is {(w.n, w.k)}, expected {(self.num_embeddings, self.embedding_dim)}")
        rows = w.parts[0] if isinstance(w, KeptWeight) else w
        if isinstance(rows, SplitRows):
            raise FormatError("the embedding's rows are of several schemes")
        self.table = RowStore(rows, to.torch_device)

    def forward(self, index: Tensor) -> Tensor:
        """index: int [...] -> [..., embedding_dim] in the model's dtype."""
        rows = self.table.rows(index.reshape(-1))  # type: ignore[union-attr]
        return rows.dequantize().to(self.dtype).reshape(*index.shape, self.embedding_dim)

    def weight_of(self, member: str = "weight") -> AnyWeight | RowStore:
        """The store of the rows, or the packed weight of a tied head."""
        assert self.table is not None
        return self.table

    def weight_shape(self, member: str = "weight") -> tuple[int, ...]:
        """(N, K)."""
        return self.num_embeddings, self.embedding_dim

    def qtensor(self, member: str = "weight") -> Weight:
        """The exact numbers of the table."""
        return self.table.qtensor()  # type: ignore[union-attr]

    def extra_repr(self) -> str:
        """Shape and what the rows are stored in."""
        return f"{self.num_embeddings}, {self.embedding_dim}"
