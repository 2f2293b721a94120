"""How many bytes of weights one decoded token reads: what its speed is held against.

Everything counts once but an embedding that is only looked up; of experts, the share that a token is sent to. The cache
of keys and values is not counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from transload.checkpoint import Checkpoint


def touched_bytes(model: PreTrainedModel) -> int:
    """Of a model in memory."""
    head: nn.Module | None = None
    with suppress(NotImplementedError):  # transformers' answer for models that have no output head
        head = model.get_output_embeddings()
    seen = _ids(model.get_input_embeddings()) - (_ids(head) if head is not None else set())
    share = expert_share(model.config.get_text_config().to_dict())
    total = 0.0
    for name, tensor in _tensors(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            total += tensor.nbytes * _part(name, share)
    return round(total)


def stored_bytes(checkpoint: Checkpoint) -> int:
    """Of a checkpoint as it is stored, for engines that keep its layout."""
    names = checkpoint.entries
    head = any(name.startswith("lm_head") for name in names)
    share = expert_share(checkpoint.config)
    counted = (e for name, e in names.items() if not (head and "embed_tokens" in name))
    return round(sum(e.stored_bytes * _part(e.name, share) for e in counted))


def expert_share(config: Mapping[str, Any]) -> float:
    """Experts of a token over experts of a layer; 1 for dense models."""
    experts = next((config[n] for n in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(n)), 0)
    used = config.get("num_experts_per_tok") or 0
    return used / experts if experts and used else 1.0


def _part(name: str, share: float) -> float:
    return share if ".experts." in f".{name}." else 1.0


def _ids(module: nn.Module) -> set[int]:
    return {id(tensor) for _, tensor in _tensors(module)}


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
