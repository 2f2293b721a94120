"""Model: the weights of a model with the scheme of each, ready to be counted on any rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transload.headers import TensorInfo
from transload.models.info import ModelInfo
from transload.plan.modules import Module, Part, end_modules, layer_modules, mtp_modules, vision_modules
from transload.plan.recipes import FLOAT_RECIPE, Recipe
from transload.plan.schemes import BF16, FP32, Kind, Scheme


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight and how it is stored."""

    module: Module
    scheme: Scheme


Layer = tuple[Weight, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Model:
    """A model to plan for. kinds are the distinct decoder layers; layer_kind[i] says which one layer i is.

    mtp is one multi-token-prediction layer, loaded only when speculation is on. other_bytes are tensors in the headers
    that no row of the model's table explains: they are counted whole on every rank. notes are shown with the plan.
    """

    name: str
    info: ModelInfo
    recipe: Recipe
    kinds: tuple[Layer, ...]
    layer_kind: tuple[int, ...]
    embed: Weight
    norm: Weight
    head: Weight
    vision: Layer
    mtp: Layer
    other_bytes: int = 0
    notes: tuple[str, ...] = ()

    def schemes(self) -> tuple[Scheme, ...]:
        """Every scheme in use, in order of first use."""
        return tuple(dict.fromkeys(w.scheme for kind in self.kinds for w in kind))

    def weights(self) -> tuple[Weight, ...]:
        """Every distinct weight of the decoder layers."""
        return tuple(dict.fromkeys(w for kind in self.kinds for w in kind))

    def four_bits(self) -> bool:
        """True when some weight has four bits or less."""
        return any(s.bits <= 4 and s.kind is not Kind.FLOAT for s in self.schemes())


def build_model(
    info: ModelInfo,
    recipe: Recipe = FLOAT_RECIPE,
    name: str = "model",
    stored: Mapping[str, Scheme] | None = None,
    other_bytes: int = 0,
    notes: tuple[str, ...] = (),
) -> Model:
    """A Model from dimensions and a recipe. stored: module name -> scheme read from headers, which beats the recipe."""
    found: dict[Layer, int] = {}
    layer_kind = []
    for i in range(info.layers):
        prefix = f"{info.names.layers}.{i}."
        layer = tuple(Weight(m, _scheme(m, prefix + m.name, recipe, stored)) for m in layer_modules(info, i))
        layer_kind.append(found.setdefault(layer, len(found)))
    embed, norm, head = end_modules(info)
    names = info.names
    mtp = tuple(
        Weight(m, _scheme(m, f"{names.layers}.{info.layers}.{m.name}", recipe, stored))
        for m in (mtp_modules(info) if info.mtp_layers else ())
    )
    return Model(
        name,
        info,
        recipe,
        tuple(found),
        tuple(layer_kind),
        Weight(embed, _scheme(embed, names.embed, recipe, stored)),
        Weight(norm, BF16),
        Weight(head, _scheme(head, names.head, recipe, stored)),
        tuple(Weight(m, BF16) for m in vision_modules(info)),
        mtp,
        other_bytes,
        notes,
    )


def _scheme(module: Module, full_name: str, recipe: Recipe, stored: Mapping[str, Scheme] | None) -> Scheme:
    if not module.quantizable and module.part is not Part.EMBEDDING:
        return FP32 if module.width == 4 else BF16
    name = full_name.replace("{e}", "0")
    if stored is not None and name in stored:
        return stored[name]
    return recipe.scheme(module, name)


def stored_bytes(headers: Mapping[str, TensorInfo]) -> int:
    """Bytes of all tensors in a checkpoint's files."""
    return sum(t.nbytes for t in headers.values())
