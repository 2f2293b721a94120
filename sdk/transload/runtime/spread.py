"""One model over several devices, RAM and disk, by a device_map such as a plan's.

Quantized weights are packed for the device that multiplies with them, so a module in RAM is computed on the CPU, where
it lies. A module on disk is computed there too: accelerate's hooks read its packed tensors before its forward and let
them go afterwards. Float checkpoints are spread by transformers and accelerate alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from accelerate.utils import (
    OffloadedWeightsLoader,
    find_tied_parameters,
    named_module_tensors,
    offload_weight,
    retie_parameters,
    set_module_tensor_to_device,
)
from torch import nn
from transformers import PreTrainedModel

from transload.errors import ConfigError
from transload.runtime.weight import PackedWeight

Place = str | int | torch.device
DISK = "disk"
_PRELOADED = ["QuantLinear", "QuantEmbedding", "QuantExperts"]  # their forward reaches into modules below them


def device_of(place: Place) -> torch.device:
    """The torch device that computes a module of that place: the CPU for RAM and disk, a CUDA index as it is."""
    if place == DISK:
        return torch.device("cpu")
    return torch.device(f"cuda:{place}" if isinstance(place, int) else place)


class Spread:
    """Places of one model's modules, and the folder of those on disk.

    places: module name -> place, as `Plan.device_map()` gives it. folder: where packed weights are written; a temporary
    folder that lives as long as the model when None.
    """

    def __init__(self, places: Mapping[str, Place], folder: str | Path | None = None) -> None:
        self.places = dict(places)
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._folder = Path(folder) if folder is not None else None
        self._index: dict[str, dict[str, object]] = {}

    @property
    def first(self) -> torch.device:
        """Where a request enters."""
        return device_of(next(iter(self.places.values())))

    @property
    def alone(self) -> torch.device | None:
        """The one device that holds everything, None when there are several or some of it lies on disk."""
        found = {device_of(place) for place in self.places.values()}
        return None if len(found) > 1 or DISK in self.places.values() else next(iter(found))

    @property
    def disk(self) -> tuple[str, ...]:
        """Modules whose place is the disk."""
        return tuple(name for name, place in self.places.items() if place == DISK)

    @property
    def folder(self) -> Path:
        """The folder of offloaded tensors, made when first asked for."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="transload-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def on(self, model: nn.Module) -> None:
        """Turns the checkpoint's module names into the model's own. Raises ConfigError for a plan of another model."""
        modules = [name for name, _ in model.named_modules()]
        self.places = {_own_name(name, modules): place for name, place in self.places.items()}

    def place_of(self, module: str) -> Place | None:
        """The place of the module or of one that it is part of, None when the map names neither."""
        covering = [p for p in self.places if p == "" or f"{module}.".startswith(f"{p}.")]
        return self.places[max(covering, key=len)] if covering else None

    def park(self, model: nn.Module, module: str) -> None:
        """Writes what a module holds to disk and lets it go, so that memory never holds the whole model."""
        part = model.get_submodule(module)
        for name, tensor in list(named_module_tensors(part, recurse=True)):
            if tensor.device.type != "meta":
                offload_weight(tensor.detach(), f"{module}.{name}", str(self.folder), self._index)
                set_module_tensor_to_device(part, name, "meta")
        for weight in part.modules():
            if isinstance(weight, PackedWeight):
                weight.lend()

    def attach(self, model: PreTrainedModel) -> None:
        """Moves what is left to its place and hooks every module: inputs come to it, weights on disk on demand."""
        tied = find_tied_parameters(model)
        for name in self.disk:
            self._store_rest(model, name)
        for name, module in model.named_modules():
            if self.place_of(name) is None:
                for tensor, _ in list(named_module_tensors(module)):
                    set_module_tensor_to_device(module, tensor, self.first)
        attach_align_device_hook_on_blocks(
            model,
            execution_device={"": self.first} | {name: device_of(place) for name, place in self.places.items()},
            offload={name: place == DISK for name, place in self.places.items()},
            offload_buffers=True,
            weights_map=OffloadedWeightsLoader(save_folder=str(self.folder), index=self._index) if self.disk else None,
            skip_keys=model._skip_keys_device_placement,
            preload_module_classes=_PRELOADED,
        )
        retie_parameters(model, tied)
        model.hf_device_map = dict(self.places)
        self.keep(model)

    def keep(self, model: PreTrainedModel) -> None:
        """Lets a temporary folder live as long as the model."""
        model._transload_spread = self

    def for_floats(self) -> dict[str, str | torch.device]:
        """A device_map for transformers: RAM and disk by name, so that it streams them, devices as torch devices."""
        return {name: str(p) if p in ("cpu", DISK) else device_of(p) for name, p in self.places.items()}

    def _store_rest(self, model: nn.Module, module: str) -> None:
        """Tensors that are still in memory (norms, biases, tied weights) beside those that were parked."""
        part = model.get_submodule(module)
        for name, tensor in named_module_tensors(part, recurse=True, remove_non_persistent=True):
            full = f"{module}.{name}" if module else name
            if full not in self._index and tensor.device.type != "meta":
                offload_weight(tensor.detach(), full, str(self.folder), self._index)
        for weight in part.modules():
            if isinstance(weight, PackedWeight):
                weight.lend()


def _own_name(name: str, modules: list[str]) -> str:
    """The module that a checkpoint calls `name`: the same, or the only one that ends like it."""
    if name in modules:
        return name
    tail = name
    while "." in tail:
        tail = tail.partition(".")[2]
        found = [m for m in modules if m == tail or m.endswith(f".{tail}")]
        if len(found) == 1:
            return found[0]
        if found:
            break
    raise ConfigError(f"the plan places '{name}', which this model does not have: is it a plan of another model?")
