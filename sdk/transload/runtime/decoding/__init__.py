"""Fast decoding of one sequence: the layers of a decoder as one call per token, behind transformers' own interfaces."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from transload.errors import Unsupported
from transload.runtime.decoding.head import take_head
from transload.runtime.decoding.stepwise import StepwiseModel

_SAID = "_transload_decoder"  # where a model keeps why it has no step


def attach(model: PreTrainedModel, whole: bool = True) -> None:
    """Puts a StepwiseModel in the place of the model's decoder, where its device has a step for it.

    whole: the model is not spread over places; then a head that stayed in float keeps its checkpoint's width.
    """
    if whole:
        take_head(model)
    name = model.base_model_prefix
    inner = getattr(model, name, None)
    if not isinstance(inner, PreTrainedModel) or inner is model:
        return
    try:
        model.set_submodule(name, StepwiseModel(inner))
    except Unsupported as e:
        model.__dict__[_SAID] = f"transformers ({e})"


def decoder_of(model: nn.Module) -> str:
    """What runs one sequence: "native-vnni, one call a token or prompt" or "transformers (reason)".

    "" where nobody asked.
    """
    inner = getattr(model, getattr(model, "base_model_prefix", None) or "", None)
    if isinstance(inner, StepwiseModel):
        return f"transformers ({inner.reason})" if inner.reason else f"{inner.kernel}, one call a token or prompt"
    said: str = model.__dict__.get(_SAID, "")
    return said
