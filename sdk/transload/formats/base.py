"""What a checkpoint format is: a reader from stored tensors to QTensors, and a writer back.

A reader sees a Source (names, shapes, dtypes, lazy bytes, config.json) and lists its entries from headers alone;
nothing is read until `decode`. Names are Hugging Face names everywhere outside the format's own file.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from torch import Tensor

from transload.errors import CannotHold, FormatError
from transload.formats.packed import PackedRows
from transload.headers import TensorInfo
from transload.quant import QTensor, QuantSpec

Json = dict[str, object]  # a JSON object as read from a foreign file


class Source(Protocol):
    """The stored side of a checkpoint: one file or a folder of shards, plus its JSON files."""

    path: Path
    config: Json  # config.json, {} where there is none
    infos: Mapping[str, TensorInfo]  # every stored tensor, from headers
    container: str  # "safetensors" or "gguf"; only formats of the same container are asked

    def read(self, name: str) -> Tensor:
        """One stored tensor, whole. GGUF block types come as raw uint8 bytes."""

    def json(self, name: str) -> Json | None:
        """A JSON object beside the weights, None where there is none."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing of a checkpoint under its Hugging Face name.

    A quantized linear: name is the module ("model.layers.0.mlp.up_proj"), spec is set, shape is (N, K) or (E, N, K).
    A float tensor or buffer: name is the full tensor name ("model.norm.weight"), spec is None.
    """

    name: str
    spec: QuantSpec | None
    shape: tuple[int, ...]
    tensors: tuple[str, ...]  # the stored tensors it is made of
    stored_bytes: int
    dtype: str = ""  # of a float tensor, in safetensors' spelling (BF16, F32, ...)


class Format(ABC):
    """One on-disk format. Instances hold no state; a checkpoint passes its Source in."""

    name: ClassVar[str]
    container: ClassVar[str] = "safetensors"  # or "gguf", "onnx"
    group_size: ClassVar[int | None] = None  # the only size of its groups, None where there are several
    embeddings: ClassVar[bool] = False  # embedding tables may be quantized too

    @abstractmethod
    def detects(self, source: Source) -> bool:
        """True when the source is of this format. Formats are asked in the order of formats.FORMATS."""

    def config(self, source: Source) -> Json:
        """config.json of the model, as Hugging Face has it."""
        return source.config

    def files(self, source: Source) -> dict[str, bytes]:
        """Files that lie inside this container and beside the weights elsewhere: tokenizer, generation settings."""
        return {}

    def notes(self, source: Source) -> list[str]:
        """What of the source no entry holds, in sentences for a report, so that nothing goes silently."""
        return []

    @abstractmethod
    def entries(self, source: Source) -> dict[str, Entry]:
        """Everything in the source, by entry name, from headers and JSON alone.

        Raises FormatError when shapes, dtypes or configuration contradict each other.
        """

    @abstractmethod
    def decode(self, source: Source, entry: Entry) -> QTensor:
        """The exact numbers of a quantized entry."""

    def read(self, source: Source, entry: Entry) -> Tensor:
        """A float entry's tensor, under Hugging Face conventions."""
        return source.read(entry.tensors[0])

    def experts(self, source: Source, entry: Entry) -> Iterator[QTensor | Tensor]:
        """The experts of a stacked entry [E, N, K], one after another, decoded or read."""
        read_expert = getattr(source, "read_expert", None)
        if read_expert is not None and entry.spec is None and type(self).read is Format.read:
            yield from (read_expert(entry.tensors[0], e) for e in range(entry.shape[0]))
            return
        whole = self.read(source, entry) if entry.spec is None else self.decode(source, entry)
        for e in range(entry.shape[0]):
            yield whole.expert(e) if isinstance(whole, QTensor) else whole[e].contiguous()

    def packed(self, source: Source, entry: Entry) -> PackedRows | None:
        """The entry with its codes still in words, None where the format packs otherwise. Optional: it saves time."""
        return None

    def encode_packed(self, name: str, rows: PackedRows) -> dict[str, Tensor] | None:
        """What `encode` makes of the same weight, without unpacking; None where the format packs otherwise."""
        return None

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """None when `encode` can write such a weight exactly; otherwise the reason, a sentence."""
        return f"'{self.name}' is read only"

    def once_per_file(self, spec: QuantSpec) -> Mapping[str, int]:
        """Settings of a module that a checkpoint of this format has once for all: {"group size": 128}."""
        return {}

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """The stored tensors, full names, of one quantized module. Only called when `cannot_hold` is None."""
        raise CannotHold(f"'{self.name}' is read only")

    def calibrated(
        self, name: str, scales: Tensor, input_scale: Tensor, bias: Tensor | None, dtype: str
    ) -> dict[str, Tensor]:
        """The stored tensors that say how static activations of one module are scaled, besides those of `encode`.

        scales: of the weight [N, G]. input_scale: float32 [1], a step of symmetric int8. bias: [N] or None. dtype: the
        model's, in the words of config.json. Formats that keep the scale alone under this name need not say so.
        """
        return {f"{name}.input_scale": input_scale}

    def finish(self, specs: Mapping[str, QuantSpec], floats: Mapping[str, tuple[int, ...]]) -> dict[str, Json]:
        """Extra JSON by file name; the object under "config.json" is merged into the model's own.

        specs: every quantized module that was written. floats: the linear modules left in float, with their shapes.
        """
        return {}

    def describe(self, specs: Mapping[str, QuantSpec], carried: Sequence[str]) -> dict[str, Json]:
        """Extra JSON by file name that must list every stored tensor (msModelSlim's description file).

        specs: every quantized module that was written. carried: full names of the float tensors and buffers copied.
        """
        return {}


@contextmanager
def naming(source: Source, entry: Entry) -> Iterator[None]:
    """Puts file and module in front of a FormatError raised inside, unless it begins with the file already.

    QTensor's checks know neither; a source's reads know the file.
    """
    try:
        yield
    except FormatError as e:
        file = source.infos[entry.tensors[0]].file if entry.tensors else source.path
        if str(e).startswith(f"{file}: "):
            raise
        raise FormatError(f"{file}: {entry.name}: {e}") from e
