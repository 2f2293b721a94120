"""Fast decoding of one sequence: the layers of a decoder as one call per token, behind transformers' own interfaces."""

from __future__ import annotations

from transformers import PreTrainedModel

from transload.errors import Unsupported
from transload.runtime.decoding.stepwise import StepwiseModel


def attach(model: PreTrainedModel) -> None:
    """Puts a StepwiseModel in the place of the model's decoder, where its device has a step for it."""
    name = model.base_model_prefix
    inner = getattr(model, name, None)
    if not isinstance(inner, PreTrainedModel) or inner is model:
        return
    try:
        model.set_submodule(name, StepwiseModel(inner))
    except Unsupported as e:
        model.__dict__["_transload_decoder"] = f"transformers ({e})"


def decoder_of(model: PreTrainedModel) -> str:
    """What decodes single tokens: "native-vnni, one call a token" or "transformers (reason)"."""
    inner = getattr(model, getattr(model, "base_model_prefix", ""), None)
    if isinstance(inner, StepwiseModel):
        return f"transformers ({inner.reason})" if inner.reason else f"{inner.kernel}, one call a token"
    reason: str = model.__dict__.get("_transload_decoder", "transformers (not loaded by Transload)")
    return reason
