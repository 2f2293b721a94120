"""What an engine takes beside weights and cache: activations, logits, workspaces, graphs, communicators.

These are estimates, marked as such; their constants come from data/constants.yaml or from a calibration file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from transload.plan.catalogue import Constant
from transload.plan.model import Model
from transload.plan.shapes import Shape
from transload.plan.units import parse_size
from transload.plan.workload import Workload


@dataclass(frozen=True, slots=True)
class Overhead:
    """One line: bytes on a rank. activation: live only while a batch runs. kind: exact, measured or estimated."""

    name: str
    size: int
    kind: str
    activation: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """What one engine step holds: tokens of a prefill batch and sequences of a decode batch."""

    tokens: int
    sequences: int


Constants = Mapping[str, Constant]


def overheads(
    model: Model, shape: Shape, layers: int, last: bool, batch: Batch, workload: Workload, constants: Constants
) -> list[Overhead]:
    """Every line for a rank of a stage with `layers` layers. last: the stage that samples."""
    lines = [
        _line("driver context", constants["context"]),
        _line("communicators", constants["communicator"], _communicators(model, shape, constants)),
    ]
    if "activation_peak" in constants:
        lines.append(Overhead("activation peak", _bytes(constants["activation_peak"]), "measured", True))
    else:
        lines += _estimated_peak(model, shape, last, batch, workload, constants)
    graphs = _bytes(constants["graphs_base"]) + layers * _bytes(constants["graphs_per_layer"])
    if graphs:
        lines.append(Overhead("captured graphs", graphs, constants["graphs_base"].kind))
    return [line for line in lines if line.size]


def _estimated_peak(
    model: Model, shape: Shape, last: bool, batch: Batch, workload: Workload, constants: Constants
) -> list[Overhead]:
    """What the profiling pass adds on top of the weights. Logits: gathered bf16 rows and a float32 copy."""
    rows = min(batch.sequences, batch.tokens) * (1 + workload.speculative_tokens) if last else 0
    workspace = _expert_workspace(model, shape, batch, constants) + _mla_workspace(model, shape, batch, workload)
    return [
        Overhead("activations", _activations(model, shape, batch, constants), "estimated", True),
        Overhead("logits", rows * model.info.vocab * 6, "estimated", True),
        Overhead("workspaces", workspace, "estimated", True),
    ]


def _communicators(model: Model, shape: Shape, constants: Constants) -> int:
    """Groups that hold buffers: world, TP, PP, DP, EP, and on Ascend MC2 for mixtures of experts."""
    if shape.devices == 1:
        return 0
    moe = model.info.experts is not None
    ascend = constants["communicator"].source.startswith("HCCL")
    return 1 + (shape.tp > 1) + (shape.pp > 1) + (shape.dp > 1) + (moe and shape.ep) + (moe and ascend)


def _activations(model: Model, shape: Shape, batch: Batch, constants: Constants) -> int:
    """Live 16-bit values of the profiling pass: c1 hidden states, the MLP's two halves, q, k and v."""
    info, t = model.info, shape.tp
    width = info.experts.shared if info.experts else info.intermediate
    width = max(width, 0 if all(info.sparse) else info.intermediate)
    heads = info.heads * info.head_dim * (2 if info.output_gate else 1) + 2 * info.kv_heads * info.head_dim
    if info.mla is not None:
        heads = info.heads * (info.mla.nope + info.mla.rope) * 2 + info.heads * info.mla.v
    row = float(constants["hidden_factor"].value) * info.hidden + 2 * width / t + heads / t
    return round(batch.tokens * 2 * row)


def _expert_workspace(model: Model, shape: Shape, batch: Batch, constants: Constants) -> int:
    """Two alternating buffers of a fused mixture: a row of hidden and one of gate and up for every chosen expert.

    Data-parallel ranks gather each other's tokens first; the kernel then works in pieces of at most 32768 tokens.
    """
    x = model.info.experts
    if x is None:
        return 0
    tokens = min(batch.tokens * shape.dp, max(batch.tokens, 32768))
    width = x.intermediate if shape.ep else x.intermediate / shape.expert_ranks
    row = x.per_token * (model.info.hidden + 2 * width) * 2
    return round(tokens * row * float(constants["workspace_factor"].value))


def _mla_workspace(model: Model, shape: Shape, batch: Batch, workload: Workload) -> int:
    """Up-projected context of chunked prefill, or the scores of a sparse indexer (at most 512 MiB a piece)."""
    mla = model.info.mla
    if mla is None:
        return 0
    if model.info.indexer is not None:
        return min(batch.tokens * workload.context * 4, 512 << 20)
    rows = min(max(8 * workload.context, 4 * batch.sequences * 64), 65536)
    return rows * (mla.kv_lora + mla.rope) * 2 + rows * model.info.heads // shape.tp * (mla.nope + mla.v) * 2


def _line(name: str, constant: Constant, count: int = 1) -> Overhead:
    return Overhead(name, _bytes(constant) * count, constant.kind)


def _bytes(constant: Constant) -> int:
    return _size(constant.value)


@lru_cache(maxsize=256)
def _size(value: float | str) -> int:
    return parse_size(value)
