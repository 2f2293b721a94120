"""A packed weight as a torch module: its tensors are buffers, so that `.to`, `state_dict` and accelerate see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from transload.errors import Unsupported
from transload.hal import Packed, Problem
from transload.quant import QTensor, QuantSpec
from transload.runtime.below import KeptWeight
from transload.runtime.gather import SplitRows, Weight
from transload.runtime.placement import Placed, Target, place

_PREFIX = "w_"  # a kernel may call its tensors anything, also what a module has as an attribute


class PackedWeight(nn.Module):
    """A weight in its kernel's layout. Several modules may hold the same one (tied embedding and head)."""

    def __init__(self, placed: Placed, device: torch.device, kept: Mapping[str, Tensor] | None = None) -> None:
        """kept: tensors that the placed weight, which has no numbers then, was packed into before."""
        super().__init__()
        self.kernel, self.x_dtype = placed.choice.kernel, placed.x_dtype
        self.requested, self.notes, self.passed_over = placed.requested, placed.notes, placed.choice.passed_over
        self.stored_act = placed.stored_act
        w = placed.weight
        packed = self.kernel.pack(w) if kept is None else Packed(self.kernel.name, w.spec, w.n, w.k, kept, w.experts)
        self._packed = self.kernel.place(packed, device)
        for name, tensor in self._packed.tensors.items():
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # tells transformers not to touch it
            self.register_buffer(_PREFIX + name, tensor)
        self._is_hf_initialized = True
        self.lent = False

    def lend(self) -> None:
        """From now on the tensors come and go with accelerate's hooks: none of them is kept here between two calls."""
        empty = {name: tensor.to("meta") for name, tensor in self._packed.tensors.items()}
        self._packed, self.lent = replace(self._packed, tensors=empty), True

    @property
    def packed(self) -> Packed:
        """The packed weight over the buffers as they are now.

        The same object is returned until a buffer is replaced (by `.to`, accelerate, `load_state_dict(assign=True)`),
        because kernels keep what they prepared for a weight by the weight's identity.
        """
        buffers = self._buffers
        for name, tensor in self._packed.tensors.items():
            if buffers[_PREFIX + name] is not tensor:
                tensors = {name: cast(Tensor, buffers[_PREFIX + name]) for name in self._packed.tensors}
                fresh = replace(self._packed, tensors=tensors)
                if self.lent:
                    return fresh
                self._packed = fresh
                break
        return self._packed

    @property
    def spec(self) -> QuantSpec:
        """The scheme that was packed, activations included."""
        return self._packed.spec

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] times the weight plus bias [N]: [..., N] in x's dtype."""
        if x.dtype != self.x_dtype:
            return self.matmul(x.to(self.x_dtype), bias).to(x.dtype)
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        p = self.packed
        return self.kernel.matmul(x.reshape(-1, p.k), p, bias).reshape(*x.shape[:-1], p.n)

    def grouped_matmul(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows x [M, K] sorted by expert, counts int64 [E]: [M, N] in x's dtype."""
        return self.kernel.grouped_matmul(x.to(self.x_dtype), self.packed, counts).to(x.dtype)

    def rows(self, index: Tensor) -> QTensor:
        """The output rows `index` (int64 [R]) as a quantized weight. Raises Unsupported where the kernel cannot."""
        return self.kernel.rows(self.packed, index).with_act(None)

    def qtensor(self) -> QTensor:
        """The exact weight that was packed, with the activations of the checkpoint, not those chosen for the device."""
        return self.kernel.unpack(self.packed).with_act(self.stored_act)

    def extra_repr(self) -> str:
        """Scheme, kernel and precision, for `print(model)`."""
        p = self._packed
        experts = f"experts={p.experts}, " if p.experts else ""
        return f"{experts}in={p.k}, out={p.n}, {p.spec}, kernel={self.kernel.name}, runs={self.executed}"

    @property
    def executed(self) -> str:
        """The scheme that really runs: W4A16, W4A8, ..."""
        p = self._packed
        return self.kernel.executed(Problem(p.n, p.k, p.spec, self.x_dtype, None, p.experts))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves buffers but never casts them: `.half()` would change scales under the kernel."""

        def moved(t: Tensor) -> Tensor:
            out = fn(t)
            return out if out.dtype == t.dtype else t.to(out.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self


class SplitWeight(nn.Module):
    """Packed weights below each other, each in a scheme and kernel of its own, that act as one."""

    def __init__(self, parts: Sequence[PackedWeight]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def packed_parts(self) -> list[PackedWeight]:
        """The parts from top to bottom."""
        return [cast(PackedWeight, part) for part in self.parts]

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [..., K] times the weight plus bias [N]: [..., N] in x's dtype."""
        y = torch.cat([part.matmul(x) for part in self.packed_parts()], dim=-1)
        return y if bias is None else y + bias.to(y.dtype)

    def grouped_matmul(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows x [M, K] sorted by expert, counts int64 [E]: [M, N] in x's dtype."""
        return torch.cat([part.grouped_matmul(x, counts) for part in self.packed_parts()], dim=-1)

    def rows(self, index: Tensor) -> QTensor:
        """Raises Unsupported: an embedding's rows are of one scheme."""
        raise Unsupported("rows of a weight with several schemes are not looked up")

    def qtensor(self) -> SplitRows:
        """The exact weight that was packed."""
        return SplitRows(tuple(part.qtensor() for part in self.packed_parts()))


AnyWeight = PackedWeight | SplitWeight


def pack(w: Weight | KeptWeight, to: Target) -> AnyWeight:
    """Chooses a kernel for `w` on the target and packs it, unless it comes packed. Raises NoKernel."""
    if isinstance(w, KeptWeight):
        kept = [PackedWeight(place(part.blank(), to), to.torch_device, part.tensors) for part in w.parts]
        return kept[0] if len(kept) == 1 else SplitWeight(kept)
    if isinstance(w, SplitRows):
        return SplitWeight([PackedWeight(place(part, to), to.torch_device) for part in w.parts])
    return PackedWeight(place(w, to), to.torch_device)
