"""A transformers decoder as hal.Decoder: which of its modules are what, and why a model cannot be described."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transload.errors import Unsupported
from transload.hal import Decoder, DecoderLayer, DecoderLinear, DecoderMlp, Kernel, Packed
from transload.runtime.linear import QuantLinear
from transload.runtime.weight import PackedWeight, SplitWeight

DTYPES = (torch.float32, torch.bfloat16)  # of activations


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between decoders: neighbours turned as pairs, and the norms behind attention and MLP.

    windows: "none", "config" (one for all layers), or "layer" (each attention module has its own).
    """

    windows: str = "none"
    interleaved: bool = False
    after_attention: str | None = None
    after_mlp: str | None = None


# transformers' model class -> what is special about it. All are dense, with root-mean-square norms and SiLU gates.
FAMILIES = {
    "LlamaModel": Family(),
    "MistralModel": Family("config"),
    "Qwen2Model": Family("layer"),
    "Qwen3Model": Family("layer"),
    "Phi3Model": Family("config"),
    "GlmModel": Family(interleaved=True),
    "Glm4Model": Family("none", True, "post_self_attn_layernorm", "post_mlp_layernorm"),
}


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
    layers = tuple(_layer(layer, family, window, f"layers.{i}") for i, layer in enumerate(model.layers))
    decoder = Decoder(
        layers=layers[: config.num_hidden_layers],
        norm=_norm(model.norm, config.rms_norm_eps, "norm"),
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
    """Whether two descriptions are of the same tensors."""
    left, right = list(_tensors(a)), list(_tensors(b))
    return len(left) == len(right) and all(x is y for x, y in zip(left, right, strict=True))


def _tensors(d: Decoder) -> Iterator[object]:
    yield d.norm
    for layer in d.layers:
        yield from (layer.attention_norm, layer.q_norm, layer.k_norm, layer.after_attention)
        yield from (layer.mlp_norm, layer.after_mlp)
        for linear in (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down):
            for weight, bias in linear.parts:
                yield from (weight.tensors["packed"] if isinstance(weight, Packed) else weight, bias)


def _kernel(model: Any) -> Kernel:
    for module in model.layers.modules():
        if isinstance(module, PackedWeight):
            return module.kernel
    raise Unsupported("its layers are not quantized")


def _layer(layer: Any, family: Family, config_window: int | None, name: str) -> DecoderLayer:
    attention, mlp = layer.self_attn, layer.mlp
    for module, inside in ((layer, name), (attention, f"{name}.self_attn"), (mlp, f"{name}.mlp")):
        _without_hooks(module, inside)
    eps = layer.input_layernorm.variance_epsilon
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    after = [None if n is None else getattr(layer, n) for n in (family.after_attention, family.after_mlp)]
    norms = (layer.input_layernorm, q_norm, k_norm, after[0], layer.post_attention_layernorm, after[1])
    weights = [None if m is None else _norm(m, eps, f"a norm of {name}") for m in norms]
    first, second = weights[0], weights[4]
    assert first is not None  # the model class has these two
    assert second is not None
    return DecoderLayer(
        first, weights[1], weights[2], weights[3], second, weights[5],
        qkv=_linear(attention, name, ("qkv_proj",), ("q_proj", "k_proj", "v_proj")),
        out=_linear(attention, name, ("o_proj",)),
        mlp=DecoderMlp(
            _linear(mlp, name, ("gate_up_proj",), ("gate_proj", "up_proj")), _linear(mlp, name, ("down_proj",))
        ),
        window=attention.sliding_window if family.windows == "layer" else config_window,
    )  # fmt: skip


def _norm(module: Any, eps: float, name: str) -> Tensor:
    _without_hooks(module, name)
    if not type(module).__name__.endswith("RMSNorm") or getattr(module, "variance_epsilon", None) != eps:
        raise Unsupported(f"{name} is {module}, expected a root-mean-square norm with eps {eps}")
    weight: Tensor = module.weight
    return weight


def _linear(parent: nn.Module, name: str, *choices: tuple[str, ...]) -> DecoderLinear:
    """The first choice of members that the parent has, as one linear layer."""
    for members in choices:
        if all(hasattr(parent, member) for member in members):
            parts = [part for m in members for part in _parts(getattr(parent, m), f"{name}.{m}")]
            return DecoderLinear(tuple(parts))
    raise Unsupported(f"{name} has no {choices[0][0]}")


def _parts(module: nn.Module, name: str) -> Iterator[tuple[Packed | Tensor, Tensor | None]]:
    _without_hooks(module, name)
    if type(module) is nn.Linear:
        yield module.weight, module.bias
    elif type(module) is QuantLinear and module.packed is not None:
        weight = module.packed
        start = 0
        for part in weight.packed_parts() if isinstance(weight, SplitWeight) else [weight]:
            if part.lent:
                raise Unsupported(f"{name} comes and goes with the plan that spreads the model")
            packed = part.packed
            yield packed, None if module.bias is None else _rows(module.bias, start, packed.n)
            start += packed.n
    else:
        raise Unsupported(f"{name} is a {type(module).__name__}")


def _rows(bias: Tensor, start: int, count: int) -> Tensor:
    return bias if count == len(bias) else bias[start : start + count]


def _without_hooks(module: nn.Module, name: str) -> None:
    """Transformers' own hooks for output_hidden_states stay forever and do nothing unless those are asked for."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    replaced = vars(module).get("forward")  # older versions of transformers put a module's own forward there
    other = replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward
    if other or any(hook.__module__ != "transformers.utils.output_capturing" for hook in hooks):
        raise Unsupported(f"{name} has hooks, which one call for all layers would not reach")
