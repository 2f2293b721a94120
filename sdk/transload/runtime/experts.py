"""The fused experts of a mixture-of-experts layer with quantized weights.

Transformers 5 keeps all experts of a layer in two 3-D parameters, which quantizers that walk over nn.Linear miss. The
module is recognized by what it holds and by the layout it declares, not by its class.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from transload.errors import FormatError
from transload.runtime.below import KeptWeight
from transload.runtime.gather import Weight
from transload.runtime.placement import Target
from transload.runtime.weight import AnyWeight, PackedWeight, pack

PROJECTIONS = ("gate_up_proj", "down_proj")


def is_experts(module: nn.Module) -> bool:
    """True for a module that holds gate_up_proj and down_proj as 3-D parameters."""
    return all(isinstance(p, nn.Parameter) and p.dim() == 3 for p in (getattr(module, n, None) for n in PROJECTIONS))


def experts_refusal(module: nn.Module) -> str | None:
    """Why these experts cannot run quantized, a sentence; None when they can.

    `_apply_gate` is what transformers gives every experts class that says it computes gate_up, gate and down and
    nothing else; a module with further weights (biases, norms) or transposed ones computes something else.
    """
    kind = type(module).__name__
    if not callable(getattr(module, "_apply_gate", None)):
        return f"{kind} does not say how gate and up projection are combined"
    experts, double, hidden = module.get_parameter(PROJECTIONS[0]).shape
    if tuple(module.get_parameter(PROJECTIONS[1]).shape) != (experts, hidden, double // 2):
        return f"{kind} has transposed weights: {PROJECTIONS[0]} is {(experts, double, hidden)}"
    further = sorted({name for name, _ in module.named_parameters()} - set(PROJECTIONS))
    return f"{kind} has further weights: {', '.join(further)}" if further else None


class QuantExperts(nn.Module):
    """Stands in for a fused experts module: the same forward, weights packed for a grouped matmul.

    gate: the replaced module's own way from gate_up [M, 2I] to [M, I], so that activations, clamps and limits of a
    model family stay what they are.
    """

    gate_up: AnyWeight | None
    down: AnyWeight | None

    def __init__(self, num_experts: int, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.num_experts, self._gate = num_experts, gate
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.swiglu = _is_swiglu(gate)  # whether the gate is silu(left half) * right half
        self.register_module("gate_up", None)
        self.register_module("down", None)

    @classmethod
    def replacing(cls, module: nn.Module) -> QuantExperts:
        """An unfilled stand-in for a module that `experts_refusal` accepts. Takes the weights out of the module."""
        gate = cast(Callable[[Tensor], Tensor], module._apply_gate)
        experts = cls(len(module.get_parameter(PROJECTIONS[0])), gate)
        for name in PROJECTIONS:
            setattr(module, name, None)
        return experts

    def fill(self, member: str, w: Weight | KeptWeight, to: Target) -> None:
        """Packs one of the two projections. Raises NoKernel, FormatError for a wrong number of experts."""
        if w.experts != self.num_experts:
            raise FormatError(f"{member} has {w.experts} experts, expected {self.num_experts}")
        self._shapes[member] = (w.experts, w.n, w.k)
        if member == PROJECTIONS[0]:
            self.gate_up = pack(w, to)
        else:
            self.down = pack(w, to)

    def weight_of(self, member: str) -> AnyWeight:
        """The packed weight of one projection."""
        packed = self.gate_up if member == PROJECTIONS[0] else self.down
        assert packed is not None
        return packed

    def weight_shape(self, member: str) -> tuple[int, ...]:
        """(E, N, K) of one projection."""
        return self._shapes[member]

    def qtensor(self, member: str) -> Weight:
        """The exact weight of one projection, for saving."""
        return self.weight_of(member).qtensor()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, top_k], top_k_weights [T, top_k] -> [T, H].

        An index of num_experts or above means "not here" and adds nothing, as in transformers.
        """
        tokens, top_k = top_k_index.shape
        chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
        order, counts, elsewhere = self._rows(chosen, order)
        out = self._products(hidden_states.index_select(0, order // top_k), counts)
        if elsewhere is not None:
            out = out.masked_fill(elsewhere.unsqueeze(1), 0)
        out = out * top_k_weights.reshape(-1, 1).index_select(0, order)
        placed = out.new_zeros(tokens * top_k, out.shape[-1]).index_copy_(0, order, out)
        return placed.view(tokens, top_k, out.shape[-1]).sum(1).to(hidden_states.dtype)

    def _rows(self, chosen: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(order of the rows to compute, int64 counts [E] that add up to them, which of them to drop or None).

        Rows of experts that live elsewhere come last. In host memory they are left out. On a device, and in a graph,
        nothing may wait for their number: the last expert computes them too, and its results for them are dropped.
        """
        if chosen.device.type == "cpu" and not torch.compiler.is_compiling():
            counts = torch.bincount(chosen, minlength=self.num_experts)[: self.num_experts]
            return order[: int(counts.sum())], counts, None
        home = chosen.clamp(max=self.num_experts - 1)
        counts = chosen.new_zeros(self.num_experts).scatter_add_(0, home, torch.ones_like(home))
        return order, counts, chosen >= self.num_experts

    def _products(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Both projections and the gate between them, in one step where the kernel fuses them."""
        gate_up, down = self.weight_of(PROJECTIONS[0]), self.weight_of(PROJECTIONS[1])
        if self.swiglu and isinstance(gate_up, PackedWeight) and isinstance(down, PackedWeight):
            x = rows.to(gate_up.x_dtype)
            same = gate_up.kernel is down.kernel
            fused = gate_up.kernel.swiglu_experts(x, gate_up.packed, down.packed, counts) if same else None
            if fused is not None:
                return fused.to(rows.dtype)
        return down.grouped_matmul(self._gate(gate_up.grouped_matmul(rows, counts)), counts)


def _is_swiglu(gate: Callable[[Tensor], Tensor]) -> bool:
    """True for silu(left half) * right half without limits: asked with numbers, because names differ by family."""
    probe = torch.linspace(-100, 100, 64, device="cpu").reshape(4, 16)
    left, right = probe.chunk(2, -1)
    try:
        found = gate(probe)
    except RuntimeError:  # a gate with weights of its own, elsewhere
        return False
    return found.shape == left.shape and torch.allclose(found, torch.nn.functional.silu(left) * right)
