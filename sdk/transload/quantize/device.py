"""Where a decoder layer is calibrated and quantized: the CPU, or an accelerator that torch knows.

The layer, its weights and the statistics go there, one layer at a time; hidden states between layers stay in their
file, and results come back. The maths is torch's and the same everywhere.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from transload.errors import ConfigError
from transload.quant import QTensor
from transload.quantize.held import Filled, held_of
from transload.quantize.layerwise import Forward

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device of a name: "cpu", "cuda", "cuda:1", "npu". Raises ConfigError for one that is not there."""
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"device '{name}': torch knows no such device; give cpu, cuda or cuda:1") from e
    if device.type == "cpu":
        return device
    module = getattr(torch, device.type, None)
    count = module.device_count() if module is not None and module.is_available() else 0
    if count == 0:
        raise ConfigError(f"device '{name}': torch {torch.__version__} finds none on this machine; cpu is always there")
    if device.index is not None and device.index >= count:
        raise ConfigError(f"device '{name}': there are {count}, counted from 0")
    return device


def move(filled: Filled, device: torch.device) -> None:
    """Takes a filled layer to a device, in place."""
    if device == CPU:
        return
    for module in filled.layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.to(device), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
    for _, held in held_of(filled.layer):
        held.weight = None if held.weight is None else held.weight.to(device)
        held.bias = None if held.bias is None else held.bias.to(device)


def move_arguments(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """What a layer is called with besides hidden states, its tensors on a device."""
    moved: dict[str, Any] = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, arguments)
    return moved


def through(run: Forward, device: torch.device) -> Forward:
    """A layer on a device as a function of hidden states that are elsewhere, which its outputs go back to."""
    return run if device == CPU else lambda hidden: run(hidden.to(device)).to(hidden.device)


def back(w: QTensor) -> QTensor:
    """A quantized weight in ordinary memory."""
    if w.codes.device == CPU:
        return w
    parts = {name: getattr(w, name) for name in ("codes", "scales", "zeros", "mins", "g_idx")}
    return replace(w, **{name: t.cpu() for name, t in parts.items() if t is not None})
