"""Rotation: the residual stream and the value heads are turned by Hadamard matrices, which spread outliers evenly.

Ashkboos et al. 2024 (QuaRot), offline part. With R orthogonal and every norm's gain moved into the linears behind it,

    rms(x R) = rms(x) R      reads:  W diag(gain) R      writes:  R^T W, R^T b      embedding:  E R

computes the same model. The heads of v are turned by a second matrix, and o turned back. Nothing happens at run time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.quantize.fold import gain_offset, pairs_of
from transload.quantize.hadamard import Turn, block_size
from transload.quantize.held import Filled, Held, held_of

_HEAD_SEED = 1  # added to the recipe's seed for the value heads
_WRITERS = ("o_proj", "out_proj", "dense", "down_proj", "w2", "fc2")
_RESIDUAL_NORMS = ("input_layernorm", "post_attention_layernorm")


class Rotation:
    """What one model is turned by: its residual stream, of `width` features, and its value heads."""

    def __init__(self, hidden: int, seed: int) -> None:
        self.residual, self._seed, self.width = Turn(hidden, seed), seed, hidden
        self.note = f"residual stream of {hidden} rotated in Hadamard blocks of {block_size(hidden)}"

    def layer(self, filled: Filled) -> dict[str, Tensor]:
        """Rotates a filled layer in place; returns its changed float parameters by name in the layer.

        Raises ConfigError for layers that are not built of two norms, attention and MLP.
        """
        changed: dict[str, Tensor] = {}
        norms = {n for n, m in filled.layer.named_children() if getattr(m, "weight", None) is not None}
        if norms != set(_RESIDUAL_NORMS):
            raise ConfigError(f"layers with the norms {', '.join(sorted(norms))} cannot be rotated here")
        held = held_of(filled.layer)
        reading = {h for p in pairs_of(filled, held) if p.producer in _RESIDUAL_NORMS for h in p.consumers}
        writing = {h for n, h in held if h not in reading and _writes(n, h, self.width)}
        self._check(held, reading, writing)
        for pair in list(pairs_of(filled, held)):
            if pair.producer in _RESIDUAL_NORMS:
                self._read(filled, pair.producer, pair.consumers, pair.others, changed)
            elif pair.producer.endswith("v_proj"):
                self._turn_heads(filled, pair.producer, pair.consumers[0], changed)
        for name, h in held:
            if h in writing:
                h.set(self.rows(_double(h).T).T.contiguous())
                if h.bias is not None:
                    h.bias = changed[f"{name}.bias"] = filled.as_stored(f"{name}.bias", self.rows(h.bias))
        return changed

    def rows(self, values: Tensor) -> Tensor:
        """x R for rows [..., H] of the embedding, float32."""
        return self.residual.rows(values)

    def back(self, values: Tensor) -> Tensor:
        """x R^T: the reverse of `rows`."""
        return self.residual.back(values)

    def head(self, weight: Tensor, gain: Tensor) -> Tensor:
        """The output head [V, H] behind the last norm, whose gain moves into it; in slabs, float32."""
        out = torch.empty(weight.shape)
        for start in range(0, len(weight), 8192):
            out[start : start + 8192] = self.rows(weight[start : start + 8192].double() * gain.double())
        return out

    def _read(
        self, filled: Filled, norm: str, consumers: list[Held], others: list[str], changed: dict[str, Tensor]
    ) -> None:
        module = filled.layer.get_submodule(norm)
        offset = gain_offset(module)
        parameter = filled.layer.get_parameter(f"{norm}.weight")
        gain = (parameter.data + offset).double()
        parameter.data = changed[f"{norm}.weight"] = torch.full_like(parameter.data, 1 - offset)
        for consumer in consumers:
            consumer.set(self.rows(_double(consumer) * gain))
        for name in others:
            router = filled.layer.get_parameter(name)
            router.data = changed[name] = filled.as_stored(name, self.rows(router.data.double() * gain))

    def _turn_heads(self, filled: Filled, producer: str, output: Held, changed: dict[str, Tensor]) -> None:
        value = filled.layer.get_submodule(producer)
        assert isinstance(value, Held)
        dim = getattr(filled.layer.get_submodule(producer.rpartition(".")[0]), "head_dim", 0)
        if not dim or block_size(dim) < 4:
            return
        turn = Turn(dim, self._seed + _HEAD_SEED)
        weight = _double(value)
        value.set(turn.rows(weight.T.reshape(weight.shape[1], -1, dim)).reshape(weight.T.shape).T.contiguous())
        if value.bias is not None:
            bias = turn.rows(value.bias.view(-1, dim)).flatten()
            value.bias = changed[f"{producer}.bias"] = filled.as_stored(f"{producer}.bias", bias)
        weight = _double(output)
        output.set(turn.rows(weight.view(len(weight), -1, dim)).reshape(weight.shape))

    def _check(self, held: list[tuple[str, Held]], reading: set[Held], writing: set[Held]) -> None:
        """Every linear as wide as the residual stream must be known to read or to write it."""
        for name, h in held:
            if h.k == self.width and h not in reading and "o_proj" not in name and "down" not in name:
                raise ConfigError(f"{name} reads the residual stream in a way that rotation does not know")


def _writes(name: str, held: Held, hidden: int) -> bool:
    named = name.rpartition(".")[2] in _WRITERS or ".down." in name
    return named and held.weight is not None and len(held.weight) == hidden


def _double(held: Held) -> Tensor:
    assert held.weight is not None
    return held.weight.double()
