"""Embeddings tied to output heads: one set of numbers in memory, looked up by rows and multiplied as a matrix."""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import nn
from transformers import PreTrainedModel

from transload.errors import Unsupported
from transload.runtime.below import KeptWeight
from transload.runtime.embedding import QuantEmbedding, RowStore
from transload.runtime.gather import SplitRows, Weight
from transload.runtime.linear import QuantLinear
from transload.runtime.placement import Target
from transload.runtime.standins import fill, owner_of

Ties = dict[str, tuple[str, ...]]  # parameter with numbers -> the parameters that share them


def take_ties(model: PreTrainedModel, quantized: Container[str], stored: Container[str] = ()) -> Ties:
    """The tied parameters of which one is quantized, taken out of transformers' own tying, which expects floats.

    quantized: parameters that will get quantized weights. stored: names of float tensors in the checkpoint; a parameter
    among them has numbers of its own and is tied to nothing.
    """
    ties: dict[str, tuple[str, ...]] = {}
    for target, source in list(model.all_tied_weights_keys.items()):
        if source not in quantized and target not in quantized:
            continue
        del model.all_tied_weights_keys[target]
        forget_tie(model, target)
        with_numbers, follower = (source, target) if source in quantized else (target, source)
        if follower not in quantized and follower not in stored:
            ties[with_numbers] = (*ties.get(with_numbers, ()), follower)
    return ties


def forget_tie(model: PreTrainedModel, target: str) -> None:
    """Takes a tie out of what `model.tie_weights()` would work from when it is called again, after loading."""
    for name, module in model.named_modules():
        keys = getattr(module, "_tied_weights_keys", None) if isinstance(module, PreTrainedModel) else None
        local = target.removeprefix(f"{name}.") if name else target
        if isinstance(keys, dict) and local in keys:
            module._tied_weights_keys = {key: source for key, source in keys.items() if key != local}


def fill_tied(model: nn.Module, parameter: str, followers: tuple[str, ...], w: Weight | KeptWeight, to: Target) -> None:
    """Fills `parameter` and the stand-ins tied to it from one weight, packed once where the kernel can look up rows."""
    modules = [model.get_submodule(owner_of(name)) for name in (parameter, *followers)]
    heads = [m for m in modules if isinstance(m, QuantLinear)]
    embeddings = [m for m in modules if isinstance(m, QuantEmbedding)]
    for module in modules:
        module._parameters.pop("weight", None)
    for follower in modules[1:]:
        assert isinstance(follower, QuantLinear | QuantEmbedding)
        follower.tied = True
    if not heads:
        fill(model, parameter, w, to)
        for other in embeddings:
            other.table = next(m.table for m in embeddings if m.table is not None)
        return
    if isinstance(w, SplitRows):
        raise Unsupported(f"{parameter}: rows of several schemes in an embedding that is tied to the output head")
    heads[0].fill("weight", w, to)
    packed = heads[0].packed
    assert packed is not None
    for head in heads[1:]:
        head.packed = packed
    try:
        packed.rows(torch.zeros(1, dtype=torch.int64, device=to.torch_device))
        table: RowStore | None = None
    except Unsupported:
        if isinstance(w, KeptWeight):
            raise
        table = RowStore(w, to.torch_device)
    for embedding in embeddings:
        embedding.table = packed if table is None else table
