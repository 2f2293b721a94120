"""The linears of one decoder layer while it is being quantized: weights as stored, multiplied in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from transload.errors import Unsupported
from transload.quant import QTensor
from transload.quantize.statistics import Watch
from transload.runtime.experts import PROJECTIONS, experts_refusal, is_experts
from transload.runtime.trace import Piece, expert_name


class Held(nn.Module):
    """A linear, and where its rows come from.

    weight: [N, K] in the checkpoint's dtype, so that a layer in memory is as large as on disk. pieces: the stored
    modules that its rows are, in order. watch: where inputs are reported during a pass.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, pieces: tuple[Piece, ...], routed: bool = False) -> None:
        super().__init__()
        self.weight: Tensor | None = weight
        self.bias, self.pieces, self.routed = bias, pieces, routed
        self.watch: Watch | None = None
        self.trial: Tensor | None = None  # a weight that is only tried
        self.quantized: dict[str, QTensor] = {}
        self.precision = torch.float32
        self.stored_dtype, self.changed = weight.dtype, False

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N], with the quantized weight as soon as there is one."""
        if self.watch is not None:
            self.watch.see(self, x, 1 if self.routed else None)
        weight = self.current().to(self.precision)
        if self.precision is x.dtype:
            return nn.functional.linear(x, weight, self.bias)
        y = nn.functional.linear(x.to(self.precision), weight).to(x.dtype)
        return y if self.bias is None else y + self.bias

    def set(self, weight: Tensor) -> None:
        """Another float weight [N, K], float32."""
        self.weight, self.changed = weight, True

    @property
    def k(self) -> int:
        """In features."""
        return next(iter(self.quantized.values())).k if self.weight is None else self.weight.shape[1]

    def current(self) -> Tensor:
        """The weight [N, K] with every piece that is quantized already as its numbers are."""
        if self.trial is not None:
            return self.trial
        if not self.quantized:
            assert self.weight is not None
            return self.weight
        rows = [self.quantized[n].dequantize() if n in self.quantized else self.rows(at) for n, at in self.parts()]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def rows(self, at: slice) -> Tensor:
        """Rows of the float weight, float32."""
        assert self.weight is not None
        return self.weight[at].float()

    def stored_rows(self, at: slice) -> Tensor:
        """The same as they are stored; nothing is copied."""
        assert self.weight is not None
        return self.weight[at]

    def take(self, made: dict[str, QTensor]) -> None:
        """Goes on with quantized pieces; the float weight is let go when it is not needed any more."""
        self.quantized |= made
        if self.quantized.keys() >= set(self.names):
            self.weight = None

    def parts(self) -> Iterator[tuple[str, slice]]:
        """The stored module of every piece and the rows of this weight that it is."""
        start = 0
        for piece in self.pieces:
            stop = start + piece.stop - piece.start
            yield expert_name(piece.source, piece.expert), slice(start, stop)
            start = stop

    @property
    def names(self) -> tuple[str, ...]:
        """The stored modules."""
        return tuple(name for name, _ in self.parts())


class HeldExperts(nn.Module):
    """Routed experts as one pair of linears each. gate: the model's own way from gate_up [M, 2I] to [M, I]."""

    def __init__(self, gate_up: list[Held], down: list[Held], gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_up, self.down, self._gate = nn.ModuleList(gate_up), nn.ModuleList(down), gate

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, H], top_k_index int64 [T, top_k], top_k_weights [T, top_k] -> [T, H]."""
        out = torch.zeros_like(hidden_states)
        for e, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, place = torch.where(top_k_index == e)
            if len(token):
                made = down(self._gate(gate_up(hidden_states[token])))
                out.index_add_(0, token, (made * top_k_weights[token, place, None]).to(out.dtype))
        return out


@dataclass(slots=True)
class Filled:
    """A decoder layer with its weights. dtypes: in which the float parameters are stored, by name in the layer."""

    layer: nn.Module
    dtypes: dict[str, torch.dtype]

    def as_stored(self, name: str, value: Tensor) -> Tensor:
        """A new value of a parameter as it will be read back: rounded to the stored dtype, in float32."""
        return value.to(self.dtypes[name]).float()


def hold(
    layer: nn.Module,
    prefix: str,
    read: Callable[[str, int | None], tuple[Tensor, tuple[Piece, ...]]],
    floats: Callable[[str], Tensor],
) -> Filled:
    """Fills a decoder layer that is on the meta device, in place; linears become Held, routed experts HeldExperts.

    prefix: the layer's name in the model. read: the weight of a matrix parameter by its full name, and of one expert of
    a stacked one. floats: any other parameter or buffer. Raises Unsupported for experts that compute something else.
    """
    dtypes: dict[str, torch.dtype] = {}

    def as_floats(name: str) -> Tensor:
        value = floats(f"{prefix}.{name}")
        dtypes[name] = value.dtype
        return value.float()

    for name, module in list(layer.named_modules()):
        full = f"{prefix}.{name}" if name else prefix
        if isinstance(module, nn.Linear):
            weight, pieces = read(f"{full}.weight", None)
            bias = None if module.bias is None else as_floats(f"{name}.bias")
            _replace(layer, name, Held(weight, bias, pieces))
        elif is_experts(module):
            if reason := experts_refusal(module):
                raise Unsupported(f"{full} cannot be calibrated: {reason}")
            count = len(module.get_parameter(PROJECTIONS[0]))
            up, down = ([Held(*_bare(read(f"{full}.{p}", e)), routed=True) for e in range(count)] for p in PROJECTIONS)
            _replace(layer, name, HeldExperts(up, down, cast(Callable[[Tensor], Tensor], module._apply_gate)))
    for name, parameter in list(layer.named_parameters()):
        if parameter.is_meta:
            owner, _, member = name.rpartition(".")
            value = nn.Parameter(as_floats(name), requires_grad=False)
            setattr(layer.get_submodule(owner), member, value)
    for name, buffer in list(layer.named_buffers()):
        owner, _, member = name.rpartition(".")
        module = layer.get_submodule(owner)
        if member not in module._non_persistent_buffers_set:
            module._buffers[member] = floats(f"{prefix}.{name}").to(buffer.dtype)
    return Filled(layer, dtypes)


def held_of(layer: nn.Module) -> list[tuple[str, Held]]:
    """Every linear of a filled layer, in the order of its modules."""
    return [(name, m) for name, m in layer.named_modules() if isinstance(m, Held)]


def _bare(read: tuple[Tensor, tuple[Piece, ...]]) -> tuple[Tensor, None, tuple[Piece, ...]]:
    return read[0], None, read[1]


def _replace(root: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, member = name.rpartition(".")
    setattr(root.get_submodule(owner), member, new)
