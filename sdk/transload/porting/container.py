"""How the result of a port is stored: as a folder of safetensors, as one GGUF file, as an ONNX model.

A plan says which modules there are and what they hold; a container says where their bytes lie, which small files come
with them, and how the result is opened again. Nothing else in a port knows about containers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.porting.plan import PortPlan
from transload.writer import Layout, Writer


class Container(ABC):
    """One container for one port."""

    def __init__(self, source: Checkpoint, plan: PortPlan, target: Path) -> None:
        """Raises Unsupported or CannotHold when there is no place for the model, ConfigError for the target."""
        self.source, self.plan, self.target = source, plan, target

    @abstractmethod
    def layout(self) -> Layout:
        """The place of every tensor of the plan's outputs, under the names that they have there, and of the extras."""

    @abstractmethod
    def write_files(self, writer: Writer) -> tuple[str, ...]:
        """Writes what lies beside the weights and returns the names."""

    def extras(self) -> Mapping[str, Tensor]:
        """Small tensors that the container needs besides those of the plan."""
        return {}

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as its slot wants it: rows in the container's order, in the slot's dtype."""
        return tensor

    def rearranged(self, name: str) -> str:
        """In a word, what `stored` does to a tensor; "" where it is nothing. Each kind is decoded and compared once."""
        return ""

    def opened(self, folder: Path) -> Path:
        """What to open to read the result in a folder."""
        return folder

    def result(self) -> Path:
        """What an engine is given."""
        return self.target

    def notes(self) -> Iterator[str]:
        """Sentences for the report."""
        yield from ()
