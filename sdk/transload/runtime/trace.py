"""How a checkpoint's names and rows become a model's parameters, and back, traced instead of repeated.

Transformers renames tensors on load and fuses some (experts into one 3-D parameter, q, k, v in a few models), by rules
that live in its weight conversions and differ between models and versions. The rules are not copied here: they are run
once over tiny tensors that hold row numbers instead of weights, and the result says which rows of which quantized
tensor make up each parameter. Whatever only moves whole rows works; a rule that transposes or computes is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    rename_source_key,
    revert_weight_conversion,
)

from transload.errors import FormatError, Unsupported

Shape = tuple[int, ...]
_COLUMNS = 2


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows start .. stop - 1 of a source; expert picks one of a stacked source."""

    source: str
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Recipe:
    """Pieces in the order of a weight's rows: one tuple per expert of a stacked weight [E, N, K], one for a linear."""

    runs: tuple[tuple[Piece, ...], ...]
    stacked: bool

    def sources(self) -> set[str]:
        """The sources of all pieces."""
        return {piece.source for run in self.runs for piece in run}


@dataclass(frozen=True, slots=True)
class _Numbered:
    """A source, or one expert of one, whose rows are numbered from start on."""

    name: str
    expert: int | None
    start: int


def parameters_from(
    sources: Mapping[str, Shape], floats: Iterable[str], model: PreTrainedModel, conversions: Sequence[WeightTransform]
) -> tuple[dict[str, Recipe], list[str]]:
    """The recipe of every parameter that quantized modules make, and the modules that the model has no place for.

    sources: shape (N, K) or (E, N, K) by module name. floats: names of the other tensors; asking for them marks the
    conversions that apply as used, which saving needs to know. model: on the meta device, as transformers built it.
    Raises FormatError when shapes do not fit the model, Unsupported when a conversion does not keep rows whole.
    """
    rules = _Rules(model, conversions)
    for name in floats:
        rules.parameter(name)
    with torch.device("cpu"):  # transformers builds models with the meta device as the default
        keys, numbered = _number(sources, rules)
        found, unused = _convert(keys, rules)
        recipes = {}
        for parameter, rows in found.items():
            recipes[parameter] = _recipe(parameter, rows, tuple(rules.meta[parameter].shape), sources, numbered)
    return recipes, sorted({_module(key, sources) for key in unused})


def parameter_names(
    floats: Iterable[str], model: PreTrainedModel, conversions: Sequence[WeightTransform]
) -> dict[str, str]:
    """The stored tensor of every parameter or buffer of the model that one float tensor fills, by parameter name."""
    rules = _Rules(model, conversions)
    return {parameter: name for name in floats if (parameter := rules.parameter(name)[0]) in rules.meta}


def stored_from(parameters: Mapping[str, Shape], model: PreTrainedModel) -> dict[str, Recipe]:
    """The reverse: which rows of the model's quantized parameters make up each module on disk.

    parameters: shape (N, K) or (E, N, K) by parameter name. The recipes' sources are parameter names.
    """
    numbered: list[_Numbered] = []
    tensors: dict[str, Tensor] = {}
    start = 0
    for name, (*lead, n, _) in parameters.items():
        rows = torch.Size(lead).numel() * n
        tensors[name] = _row_numbers(start, rows).reshape(*lead, n, _COLUMNS)
        for e in range(rows // n if lead else 1):
            numbered.append(_Numbered(name, e if lead else None, start + e * n))
        start += rows
    reverted = revert_weight_conversion(model, tensors)
    return {
        name.removesuffix(".weight"): _pieces(name, t if isinstance(t, Tensor) else t[0], numbered)
        for name, t in reverted.items()
    }


class _Rules:
    """A model's weight conversions, ready to be asked for names."""

    def __init__(self, model: PreTrainedModel, conversions: Sequence[WeightTransform]) -> None:
        self.model, self.meta = model, model.state_dict()
        self._renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in conversions if isinstance(c, WeightConverter)]
        self._by_pattern = {pattern: c for c in self._converters for pattern in c.source_patterns}

    def parameter(self, key: str) -> tuple[str, str | None]:
        """The model's name for a stored tensor, and the pattern of the conversion that applies, if one does."""
        prefix = self.model.base_model_prefix
        name, pattern = rename_source_key(key, self._renamings, self._converters, prefix, self.meta)
        return (key, None) if name not in self.meta and key in self.meta else (name, pattern)

    def transform(self, key: str, name: str, pattern: str | None) -> WeightTransform:
        """A fresh conversion for one parameter."""
        return WeightRenaming(key, name) if pattern is None else deepcopy(self._by_pattern[pattern])


def used(conversions: Sequence[WeightTransform]) -> list[WeightTransform]:
    """The conversions that applied to some name; all of them in a transformers that does not keep count."""
    return [c for c in conversions if not hasattr(c, "was_used") or c.was_used()]


def _number(sources: Mapping[str, Shape], rules: _Rules) -> tuple[dict[str, Tensor], list[_Numbered]]:
    """Row numbers [N, 2] by the tensor name that a float checkpoint would have.

    A stack of experts gets a name per expert, unless the model's own parameter goes by the name of the stack.
    """
    keys: dict[str, Tensor] = {}
    numbered: list[_Numbered] = []
    start = 0
    for name, (*lead, n, _) in sources.items():
        members = range(lead[0]) if lead else (None,)
        count = n * len(members)
        rows = _row_numbers(start, count).reshape(len(members), n, _COLUMNS)
        if lead and rules.parameter(name)[0] in rules.meta:
            keys[name] = rows
        else:
            keys |= {expert_name(name, e) + ".weight": rows[i] for i, e in enumerate(members)}
        numbered += [_Numbered(name, e, start + i * n) for i, e in enumerate(members)]
        start += count
    return keys, numbered


def _row_numbers(start: int, count: int) -> Tensor:
    """int64 [count, 2], the same number twice: a conversion that mixes rows with inputs makes them differ."""
    return torch.arange(start, start + count).unsqueeze(-1).expand(-1, _COLUMNS)


def expert_name(stack: str, expert: int | None) -> str:
    """The name of one expert of a stacked module: "mlp.experts.up_proj", 3 -> "mlp.experts.3.up_proj"."""
    if expert is None:
        return stack
    parent, _, member = stack.rpartition(".")
    return f"{parent}.{expert}.{member}"


def _module(key: str, sources: Mapping[str, Shape]) -> str:
    name = key.removesuffix(".weight")
    return name if name in sources else re.sub(r"\.\d+(\.[^.]+)$", r"\1", name)


def _convert(keys: Mapping[str, Tensor], rules: _Rules) -> tuple[dict[str, Tensor], list[str]]:
    """Runs the conversions over the keys, grouped and ordered as transformers does on load."""
    transforms: dict[str, WeightTransform] = {}
    unused = []
    for key in sorted(keys, key=_natural):
        name, pattern = rules.parameter(key)
        if name not in rules.meta:
            unused.append(key)
            continue
        transform = transforms.setdefault(name, rules.transform(key, name, pattern))
        transform.add_tensor(name, key, pattern or key, keys[key])
    found: dict[str, Tensor] = {}
    for name, transform in transforms.items():
        converted = transform.convert(name, model=rules.model, config=rules.model.config)
        if isinstance(converted, tuple):  # before transformers 5.1: the parameters, and what went wrong
            converted = converted[0]
        found |= {parameter: rows if isinstance(rows, Tensor) else rows[0] for parameter, rows in converted.items()}
    return found, unused


def _natural(key: str) -> list[tuple[int, int, str]]:
    """Numbers in names sort as numbers: expert 10 comes after expert 9."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _recipe(
    parameter: str, rows: Tensor, shape: Shape, sources: Mapping[str, Shape], numbered: Sequence[_Numbered]
) -> Recipe:
    recipe = _pieces(parameter, rows, numbered)
    inputs = {sources[name][-1] for name in recipe.sources()}
    if tuple(rows.shape[:-1]) != shape[:-1] or inputs != {shape[-1]}:
        found = (*rows.shape[:-1], *inputs)
        raise FormatError(f"{parameter} is {found} in the checkpoint, but the model's config.json says {shape}")
    return recipe


def _pieces(name: str, rows: Tensor, numbered: Sequence[_Numbered]) -> Recipe:
    """Row numbers [..., N, 2] as runs of neighbouring rows of one source."""
    if rows.dim() not in (2, 3) or rows.shape[-1] != _COLUMNS or not torch.equal(rows[..., 0], rows[..., 1]):
        raise Unsupported(
            f"{name}: transformers rearranges this tensor's inputs on load; quantized groups cannot follow"
        )
    numbers = rows[..., 0].contiguous()
    stacked = numbers if rows.dim() == 3 else numbers.unsqueeze(0)
    starts = torch.tensor([s.start for s in numbered])
    return Recipe(tuple(tuple(_runs(line, starts, numbered)) for line in stacked), rows.dim() == 3)


def _runs(line: Tensor, starts: Tensor, numbered: Sequence[_Numbered]) -> Iterator[Piece]:
    owner = torch.searchsorted(starts, line, right=True) - 1
    breaks = (line.diff() != 1) | (owner.diff() != 0)
    edges = [0, *(breaks.nonzero()[:, 0] + 1).tolist(), len(line)]
    for first, last in pairwise(edges):
        source = numbered[int(owner[first])]
        start = int(line[first]) - source.start
        yield Piece(source.name, source.expert, start, start + last - first)
