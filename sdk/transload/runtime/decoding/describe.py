"""A transformers decoder as hal.Decoder: which of its modules are what, and why a model cannot be described."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from transload.errors import Unsupported
from transload.hal import Decoder, DecoderExperts, DecoderLayer, DecoderLinear, DecoderMlp, Kernel, Packed
from transload.runtime.decoding import modules
from transload.runtime.decoding.families import FAMILIES, Family
from transload.runtime.decoding.mixture import mixture
from transload.runtime.weight import PackedWeight

DTYPES = (torch.float32, torch.bfloat16)  # of activations


def describe(model: PreTrainedModel) -> tuple[Decoder, Kernel]:
    """The decoder and the kernel that multiplies its weights. Raises Unsupported with the reason, a sentence."""
    family = FAMILIES.get(type(model).__name__)
    if family is None or not type(model).__module__.startswith("transformers.models."):
        raise Unsupported(f"{type(model).__name__} is not a family that decodes natively")
    config = model.config
    if config.hidden_act not in ("silu", "swish"):
        raise Unsupported(f"its activation is {config.hidden_act}")
    if family.windows == "none" and getattr(config, "sliding_window", None) is not None:
        raise Unsupported(f"its configuration has a sliding window that {type(model).__name__} does not know")
    attention = model.layers[0].self_attn
    head_dim, heads, kv_heads = attention.head_dim, config.num_attention_heads, config.num_key_value_heads
    window = config.sliding_window if family.windows == "config" else None
    layers = tuple(_layer(layer, config, family, window, f"layers.{i}") for i, layer in enumerate(model.layers))
    decoder = Decoder(
        layers=layers[: config.num_hidden_layers],
        norm=modules.norm(model.norm, config.rms_norm_eps, "norm"),
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        rotary=2 * model.rotary_emb.inv_freq.numel(),
        interleaved=family.interleaved,
        eps=config.rms_norm_eps,
        scaling=attention.scaling,
    )
    if decoder.norm.dtype not in DTYPES:
        raise Unsupported(f"activations are {decoder.norm.dtype}")
    return decoder, _kernel(model)


def same(a: Decoder, b: Decoder) -> bool:
    """Whether two descriptions are of the same tensors, computed with in the same way."""
    left, right = list(_parts(a)), list(_parts(b))
    return len(left) == len(right) and all(_equal(x, y) for x, y in zip(left, right, strict=True))


def _equal(a: object, b: object) -> bool:
    return a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)


def _parts(d: Decoder) -> Iterator[object]:
    """Everything that a step is made from: tensors, and numbers."""
    yield d.norm
    for layer in d.layers:
        yield from (layer.attention_norm, layer.q_norm, layer.k_norm, layer.after_attention)
        yield from (layer.mlp_norm, layer.after_mlp, layer.window)
        for linear in (layer.qkv, layer.out):
            yield from _weights(linear)
        if layer.mlp is not None:
            yield from (*_weights(layer.mlp.gate_up), *_weights(layer.mlp.down))
        e = layer.experts
        if e is not None:
            yield from (e.top_k, e.sigmoid, e.bias, e.groups, e.top_groups, e.normalized, e.scaling)
            for each in (e.router, e.each.gate_up, e.each.down, *([] if e.shared_gate is None else [e.shared_gate])):
                yield from _weights(each)


def _weights(linear: DecoderLinear) -> Iterator[object]:
    for weight, bias in linear.parts:
        yield from (weight.tensors["packed"] if isinstance(weight, Packed) else weight, bias)


def _kernel(model: Any) -> Kernel:
    for module in model.layers.modules():
        if isinstance(module, PackedWeight):
            return module.kernel
    raise Unsupported("its layers are not quantized")


def _layer(layer: Any, config: Any, family: Family, config_window: int | None, name: str) -> DecoderLayer:
    attention = layer.self_attn
    for module, inside in ((layer, name), (attention, f"{name}.self_attn")):
        modules.without_hooks(module, inside)
    eps = layer.input_layernorm.variance_epsilon
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    after = [None if n is None else getattr(layer, n) for n in (family.after_attention, family.after_mlp)]
    norms = (layer.input_layernorm, q_norm, k_norm, after[0], layer.post_attention_layernorm, after[1])
    weights = [None if m is None else modules.norm(m, eps, f"a norm of {name}") for m in norms]
    first, second = weights[0], weights[4]
    assert first is not None  # the model class has these two
    assert second is not None
    mlp, experts = _mlp(layer.mlp, config, family, f"{name}.mlp")
    return DecoderLayer(
        first, weights[1], weights[2], weights[3], second, weights[5],
        qkv=modules.linear(attention, name, ("qkv_proj",), ("q_proj", "k_proj", "v_proj")),
        out=modules.linear(attention, name, ("o_proj",)),
        mlp=mlp,
        experts=experts,
        window=getattr(attention, "sliding_window", None) if family.windows == "layer" else config_window,
    )  # fmt: skip


def _mlp(module: Any, config: Any, family: Family, name: str) -> tuple[DecoderMlp | None, DecoderExperts | None]:
    """A mixture's layers need not all have experts."""
    kind = family.mixture
    if kind is not None and type(module).__name__ == kind.block:
        return mixture(module, kind, config, name)
    return modules.mlp(module, name), None
