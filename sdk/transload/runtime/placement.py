"""Choosing how one weight is multiplied: the kernel, the activations, and the dtype that enters the kernel.

The request is tried first, then the nearest thing the device can do; every step away from the request is a note that
the report shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from transload.errors import ConfigError, NoKernel
from transload.hal import Backend, Choice, Device, Problem, choose, find_device
from transload.quant import PER_CHANNEL, ActSpec, QTensor

SCHEMES = ("w4a16", "w4a8")


@dataclass(frozen=True, slots=True)
class Target:
    """Where weights go and how they are asked to be multiplied.

    scheme: "w4a16" (float activations), "w4a8" (dynamic int8 activations) or None (as the checkpoint says). The
    weight's own width does not matter here: an 8-bit weight under "w4a8" runs as W8A8.
    x_dtype: dtype of the model's activations.
    """

    backend: Backend
    device: Device
    scheme: str | None = None
    x_dtype: torch.dtype = torch.float32

    @property
    def torch_device(self) -> torch.device:
        """Where the packed weights live in torch."""
        return self.backend.torch_device(self.device)


@dataclass(frozen=True, slots=True, eq=False)
class Placed:
    """A weight and what will multiply with it. x_dtype is what the kernel is given; notes are sentences."""

    weight: QTensor
    choice: Choice
    x_dtype: torch.dtype
    requested: str
    stored_act: ActSpec | None = None
    notes: tuple[str, ...] = ()


def target(device: str = "auto", scheme: str | None = None, x_dtype: torch.dtype = torch.float32) -> Target:
    """The target of a device name (see `hal.find_device`). Raises ConfigError for an unknown scheme, NoBackend."""
    if scheme is not None and scheme.lower() not in SCHEMES:
        raise ConfigError(f"scheme '{scheme}': there are {', '.join(SCHEMES)} and None (as stored)")
    backend, found = find_device(device)
    return Target(backend, found, scheme and scheme.lower(), x_dtype)


def place(w: QTensor, to: Target) -> Placed:
    """The kernel for one weight, or NoKernel with the refusals of the request itself.

    Order of preference: the requested activations in the model's dtype; the same in float32 (a cast that loses
    nothing); for int8 activations one scale per token where scales per weight group, or static ones, are refused; last,
    float activations.
    """
    wanted = _activations(w, to.scheme)
    requested = w.with_act(wanted[0]).spec.scheme
    first_refusal: NoKernel | None = None
    for act, x_dtype in _attempts(wanted, to.x_dtype):
        candidate = w.with_act(act)
        try:
            choice = choose(to.backend, Problem.of(candidate, x_dtype), to.device)
        except NoKernel as e:
            first_refusal = first_refusal or e
            continue
        notes = tuple(_notes(wanted[0], act, x_dtype, to, first_refusal))
        return Placed(candidate, choice, x_dtype, requested, w.spec.act, notes)
    assert first_refusal is not None
    raise first_refusal


def _activations(w: QTensor, scheme: str | None) -> list[ActSpec | None]:
    """Activation specs in order of preference; the first is the request."""
    if scheme is None:
        nearest = [ActSpec()] if w.spec.act is not None and w.spec.act.static else []
        return [w.spec.act] if w.spec.act is None else [w.spec.act, *nearest, None]
    if scheme == "w4a16":
        return [None]
    per_token = ActSpec()
    if w.spec.group_size == PER_CHANNEL or w.g_idx is not None:
        return [per_token, None]
    return [replace(per_token, group_size=w.spec.group_size), per_token, None]


def _attempts(acts: list[ActSpec | None], x_dtype: torch.dtype) -> Iterator[tuple[ActSpec | None, torch.dtype]]:
    for act in acts:
        for dtype in dict.fromkeys((x_dtype, torch.float32)):
            yield act, dtype


def _notes(
    wanted: ActSpec | None, act: ActSpec | None, x_dtype: torch.dtype, to: Target, refusal: NoKernel | None
) -> Iterator[str]:
    if act != wanted:
        got = "float activations" if act is None else str(act)
        yield f"asked for {wanted}, runs with {got}: {refusal}"
    if x_dtype != to.x_dtype:
        yield f"{to.x_dtype} activations are cast to {x_dtype} for the kernel"
