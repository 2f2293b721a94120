"""Scales that move from a linear's inputs into whatever produces them, so that the layer computes the same.

    y = W x = (W diag(s)) (x / s)        x / s is what a norm with gain / s gives, or a linear with rows / s

Who produces whose inputs is read from the names that decoder layers share; `LayerJob` checks every fold by running the
layer before and after it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from transload.quantize.held import Filled, Held, HeldExperts
from transload.quantize.statistics import Watch

_CLOSING = ("o_proj", "out_proj", "dense", "down_proj", "w2", "fc2", "q_b_proj", "kv_b_proj")
_MLP = ("mlp", "block_sparse_moe", "feed_forward", "shared_expert", "shared_experts")
_MLP_NORMS = ("pre_feedforward_layernorm", "post_attention_layernorm")


@dataclass(eq=False, slots=True)
class Pair:
    """A producer and everything that reads what it produces.

    producer: a norm (with `weight`), or the name of a held linear and which of its rows. others: parameters [*, K] that
    read the same and are no held linears (routers). repeat: consumers' inputs per producer row (grouped-query heads),
    in runs of `head` rows.
    """

    label: str
    producer: str
    consumers: list[Held]
    others: list[str]
    rows: slice | None = None
    repeat: int = 1
    head: int = 0

    def narrowed(self, values: Tensor) -> Tensor:
        """Values of the consumers' inputs [K] as one per producer row: the largest of those that share it."""
        if self.repeat == 1:
            return values
        return values.view(-1, self.repeat, self.head).amax(1).flatten()

    def widened(self, scale: Tensor) -> Tensor:
        """A scale per producer row as one per input of the consumers [K]."""
        if self.repeat == 1:
            return scale
        return scale.view(-1, 1, self.head).expand(-1, self.repeat, -1).flatten()


def pairs_of(filled: Filled, held: Sequence[tuple[str, Held]]) -> Iterator[Pair]:
    """Every pair of a layer that a scale can move through."""
    named = dict(held)
    yield from _norms(filled, named)
    for name, consumer in held:
        parent, _, last = name.rpartition(".")
        value, up, fused = (named.get(f"{parent}.{n}") for n in ("v_proj", "up_proj", "gate_up_proj"))
        if last == "o_proj" and value is not None:
            n = _rows(value)
            head = getattr(filled.layer.get_submodule(parent), "head_dim", n)
            if consumer.k % n == 0 and n % head == 0:
                yield Pair(
                    f"{parent}.v_proj -> o_proj", f"{parent}.v_proj", [consumer], [], None, consumer.k // n, head
                )
        if last == "down_proj" and up is not None and _rows(up) == consumer.k:
            yield Pair(f"{parent}.up_proj -> down_proj", f"{parent}.up_proj", [consumer], [])
        if last == "down_proj" and fused is not None and _rows(fused) == 2 * consumer.k:
            rows = slice(consumer.k, 2 * consumer.k)
            yield Pair(f"{parent}.gate_up_proj -> down_proj", f"{parent}.gate_up_proj", [consumer], [], rows)
        experts, _, place = parent.rpartition(".")
        if place == "down" and isinstance(filled.layer.get_submodule(experts), HeldExperts):
            rows = slice(consumer.k, 2 * consumer.k)
            yield Pair(f"{experts}.{last} up -> down", f"{experts}.gate_up.{last}", [consumer], [], rows)


def _norms(filled: Filled, named: dict[str, Held]) -> Iterator[Pair]:
    norms = {n for n, m in filled.layer.named_children() if getattr(m, "weight", None) is not None}
    mlp_norm = next((n for n in _MLP_NORMS if n in norms), None)
    for norm, in_mlp in (("input_layernorm", False), (mlp_norm, True)):
        if norm is None or norm not in norms:
            continue
        width = len(filled.layer.get_parameter(f"{norm}.weight"))
        readers = {n: h for n, h in named.items() if _is_mlp(n) == in_mlp and h.k == width and not _closing(n)}
        others = [
            f"{n}.weight"
            for n, m in filled.layer.named_modules()
            if in_mlp and _is_mlp(n) and not isinstance(m, Held) and _is_router(m, width)
        ]
        if readers:
            short = sorted({n.rpartition(".")[2] if ".gate_up." not in n else "experts" for n in readers})
            yield Pair(f"{norm} -> {', '.join(short)}", norm, list(readers.values()), others)


def _is_mlp(name: str) -> bool:
    return name.split(".")[0] in _MLP


def _closing(name: str) -> bool:
    return name.rpartition(".")[2] in _CLOSING or ".down." in name


def _is_router(module: nn.Module, width: int) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.shape[1] == width


def _rows(held: Held) -> int:
    return 0 if held.weight is None else len(held.weight)


@dataclass(eq=False, slots=True)
class Fold:
    """A pair and the scale [rows of the producer] that its product is divided by. why: for the report."""

    pair: Pair
    scale: Tensor
    why: str

    def apply(self, filled: Filled, watch: Watch | None) -> dict[str, Tensor]:
        """Carries the fold out on a filled layer and its statistics; returns the changed float parameters by name.

        A norm's gain is rounded to the dtype that it is stored in, and the scale follows what is left.
        """
        changed: dict[str, Tensor] = {}
        producer = filled.layer.get_submodule(self.pair.producer)
        if isinstance(producer, Held):
            scale = self._divide_rows(producer, filled, changed)
        else:
            scale = self._divide_gain(producer, filled, changed)
        wide = self.pair.widened(scale)
        for consumer in self.pair.consumers:
            assert consumer.weight is not None
            consumer.set(consumer.weight.float() * wide)
        for name in self.pair.others:
            parameter = filled.layer.get_parameter(name)
            parameter.data = filled.as_stored(name, parameter.data * wide)
            changed[name] = parameter.data
        if watch is not None:
            for statistics in dict.fromkeys(watch.of[c] for c in self.pair.consumers if c in watch.of):
                statistics.divide(wide)
        return changed

    def _divide_rows(self, producer: Held, filled: Filled, changed: dict[str, Tensor]) -> Tensor:
        assert producer.weight is not None
        rows = self.pair.rows or slice(None)
        weight = producer.weight.float().clone()
        weight[rows] /= self.scale.unsqueeze(1)
        producer.set(weight)
        if producer.bias is not None:
            name = f"{self.pair.producer}.bias"
            producer.bias = producer.bias.clone()
            producer.bias[rows] /= self.scale
            changed[name] = producer.bias = filled.as_stored(name, producer.bias)
        return self.scale

    def _divide_gain(self, norm: nn.Module, filled: Filled, changed: dict[str, Tensor]) -> Tensor:
        name = f"{self.pair.producer}.weight"
        parameter = filled.layer.get_parameter(name)
        offset = gain_offset(norm)
        gain = parameter.data + offset
        parameter.data = filled.as_stored(name, gain / self.scale - offset)
        changed[name] = parameter.data
        bias = getattr(norm, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.data = filled.as_stored(f"{self.pair.producer}.bias", bias.data / self.scale)
            changed[f"{self.pair.producer}.bias"] = bias.data
        left = parameter.data + offset
        return torch.where(left != 0, gain / left, self.scale)

    def __str__(self) -> str:
        low, high = float(self.scale.min()), float(self.scale.max())
        return f"{self.pair.label}: {self.why}, scales {low:.3g} to {high:.3g}"


def gain_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight to get its gain: 1 for those that store gain - 1, else 0. Asked with numbers."""
    weight = norm.get_parameter("weight")
    probe = torch.ones(1, len(weight))
    with torch.no_grad():
        kept, weight.data = weight.data, torch.zeros_like(weight.data)
        out = norm(probe)
        weight.data = kept
    return 1.0 if float(out.abs().mean()) > 0.5 else 0.0
