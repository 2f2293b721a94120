"""A model without weights: transformers' own code on the meta device, one decoder layer filled at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping

from transload.checkpoint import Checkpoint
from transload.errors import FormatError, Unsupported
from transload.formats.base import Entry
from transload.quant import QTensor
from transload.quantize.fold import gain_offset
from transload.quantize.held import Filled, hold
from transload.runtime.loading import model_class, model_config
from transload.runtime.trace import Piece, Recipe, parameter_names, parameters_from

_CACHED_STACKS = 2  # a stack of experts is read once for all its experts


@dataclass(frozen=True, slots=True)
class Ends:
    """What lies outside the decoder layers, as model parameters; head is None when it is tied to the embedding."""

    embedding: str
    norm: str
    head: str | None


class Skeleton:
    """The decoder of a checkpoint. layers: how many it has. unused: stored modules that it has no place for."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        config = model_config(checkpoint, trust_remote_code=False)
        with init_empty_weights(include_buffers=False):
            kind = model_class(config, checkpoint.path)
            self._model = kind._from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
        self._decoder = self._model.get_decoder()
        self._layers: list[nn.Module] = list(self._decoder.layers)
        self.layers = len(self._layers)
        self._prefix = next(n for n, m in self._model.named_modules() if m is self._decoder.layers)
        matrices = {e.name.removesuffix(".weight"): e for e in checkpoint.entries.values() if _is_matrix(e)}
        others = [n for n, e in checkpoint.entries.items() if not _is_matrix(e)]
        conversions = get_model_conversion_mapping(self._model)
        shapes = {name: entry.shape for name, entry in matrices.items()}
        self._recipes, self.unused = parameters_from(shapes, others, self._model, conversions)
        self._names = parameter_names(others, self._model, conversions)
        self._matrices = matrices
        self._stacks: OrderedDict[str, QTensor | Tensor] = OrderedDict()

    @property
    def ends(self) -> Ends:
        """The parameters outside the layers."""
        root = next(n for n, m in self._model.named_modules() if m is self._decoder)
        head = self._model.get_output_embeddings()
        name = None if head is None else next(n for n, m in self._model.named_modules() if m is head) + ".weight"
        return Ends(f"{root}.embed_tokens.weight", f"{root}.norm.weight", name if name in self._recipes else None)

    @property
    def norm_offset(self) -> float:
        """What the last norm adds to its weight to get its gain: 0 or 1."""
        norm = deepcopy(self._decoder.norm)
        norm.weight = nn.Parameter(torch.zeros(self._decoder.config.hidden_size), requires_grad=False)
        return gain_offset(norm)

    def stored_name(self, parameter: str) -> str:
        """The stored tensor that a parameter is, whole. Raises Unsupported when it is put together of several."""
        recipe = self._recipes.get(parameter)
        if recipe is None:
            return self._stored(parameter)
        (pieces, *more) = recipe.runs
        if more or len(pieces) != 1:
            raise Unsupported(f"{parameter} is stored in several tensors, which cannot be changed together here")
        return f"{pieces[0].source}.weight"

    def layer(self, index: int) -> Filled:
        """One decoder layer with its weights, in float32 but for its linears. Raises FormatError for missing ones."""
        layer = deepcopy(self._layers[index])
        filled = hold(layer, f"{self._prefix}.{index}", self._matrix, self.floats)
        self._stacks.clear()
        return filled

    def layer_parameters(self, index: int) -> Iterator[tuple[str, str]]:
        """Name inside the layer and stored name of every parameter of a layer that is one whole stored tensor."""
        for name, _ in self._layers[index].named_parameters():
            full = f"{self._prefix}.{index}.{name}"
            if full in self._names or (full in self._recipes and not self._recipes[full].stacked):
                yield name, self.stored_name(full)

    def floats(self, parameter: str) -> Tensor:
        """A float parameter or buffer by its name in the model, whole."""
        if parameter in self._recipes:
            return self._matrix(parameter, None)[0]
        return self.checkpoint.read(self.checkpoint.entries[self._stored(parameter)])

    def embedded(self, ids: Tensor) -> Tensor:
        """The rows of the embedding for token ids [...]: float32 [..., H]. The table is read and let go again."""
        piece = self._recipes[self.ends.embedding].runs[0][0]
        entry = self._matrices[piece.source]
        unique, back = torch.unique(ids, return_inverse=True)
        if entry.spec is None:
            rows = self.checkpoint.read(entry)[unique].float()
        else:
            w = self.checkpoint.decode(entry)
            rows = QTensor(w.spec, w.codes[unique], w.scales[unique], *_rows_of(w, unique), w.g_idx).dequantize()
        return rows[back]

    def arguments(self, tokens: int) -> list[dict[str, Any]]:
        """What the decoder gives each of its layers, besides the hidden states, for windows of `tokens` tokens.

        The decoder itself is run over one window of zeros, with layers that only write down what they are called with.
        """
        recorders = [_Recorder(layer) for layer in self._layers]
        norm, layers = self._decoder.norm, self._decoder.layers
        self._decoder.layers, self._decoder.norm = nn.ModuleList(recorders), nn.Identity()
        try:
            with torch.no_grad():
                hidden = torch.zeros(1, tokens, self._decoder.config.hidden_size)
                self._decoder(inputs_embeds=hidden, use_cache=False)
        finally:
            self._decoder.layers, self._decoder.norm = layers, norm
        return [recorder.arguments for recorder in recorders]

    def _stored(self, parameter: str) -> str:
        name = self._names.get(parameter)
        if name is None:
            raise FormatError(f"{self.checkpoint.path}: no tensor for {parameter}, which the model needs")
        return name

    def _matrix(self, parameter: str, expert: int | None) -> tuple[Tensor, tuple[Piece, ...]]:
        recipe: Recipe | None = self._recipes.get(parameter)
        if recipe is None:
            raise FormatError(f"{self.checkpoint.path}: no weight for {parameter}, which the model needs")
        pieces = recipe.runs[expert or 0]
        rows = [self._rows(piece) for piece in pieces]
        dtypes = {t.dtype for t in rows}
        if len(dtypes) > 1:
            rows = [t.float() for t in rows]
        return rows[0] if len(rows) == 1 else torch.cat(rows), pieces

    def _rows(self, piece: Piece) -> Tensor:
        entry = self._matrices[piece.source]
        if piece.source in self._stacks:
            whole = self._stacks[piece.source]
        else:
            whole = self.checkpoint.read(entry) if entry.spec is None else self.checkpoint.decode(entry)
            if piece.expert is not None:
                self._stacks[piece.source] = whole
                while len(self._stacks) > _CACHED_STACKS:
                    self._stacks.popitem(last=False)
        if isinstance(whole, QTensor):
            one = whole if piece.expert is None else whole.expert(piece.expert)
            return one.rows(piece.start, piece.stop).dequantize()
        rows = whole if piece.expert is None else whole[piece.expert]
        return rows[piece.start : piece.stop].clone() if len(rows) > piece.stop - piece.start else rows


class _Recorder(nn.Module):
    """Stands in for a decoder layer: hands the hidden states on and remembers how it was called."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._layer = [layer]  # in a list, so that it is no submodule
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, hidden_states: Tensor, *rest: object, **arguments: Any) -> Tensor:
        if rest:
            raise Unsupported(f"{type(self._layer[0]).__name__} is called with positional arguments")
        self.arguments = arguments
        return hidden_states


def _is_matrix(entry: Entry) -> bool:
    """Weights with rows: what linears, embeddings, routers and stacks of experts have."""
    if entry.spec is not None:
        return True
    stack = len(entry.shape) == 3 and ".experts." in entry.name
    return stack or (len(entry.shape) == 2 and entry.name.endswith(".weight"))


def _rows_of(w: QTensor, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (None if w.zeros is None else w.zeros[rows], None if w.mins is None else w.mins[rows])


Forward = Callable[[Tensor], Tensor]


def forward(layer: nn.Module, arguments: dict[str, Any]) -> Forward:
    """A layer as a function of hidden states [B, T, H]."""

    def run(hidden: Tensor) -> Tensor:
        out = layer(hidden, **arguments)
        return out if isinstance(out, Tensor) else out[0]

    return run
