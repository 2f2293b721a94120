"""A port into one GGUF file: llama.cpp's names, row orders and metadata around the blocks that the format encodes.

The gguf package makes the header; tensors are written in place, experts of a stack one by one. Until it is complete the
file lies in a `.partial` folder with its journal, and is resumed like any other port.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.errors import CannotHold, ConfigError
from transload.formats.gguf import GgufSource
from transload.models.gguf_metadata import add_config, copy_metadata, rope_factors
from transload.models.gguf_places import Place, architecture_for, place_of
from transload.models.gguf_vocabulary import add_tokenizer
from transload.porting.container import Container
from transload.porting.gguf_pieces import Piece, Whole, piece_of, wholes_of
from transload.porting.plan import PortPlan
from transload.writer import Layout, Shard, Slot, Writer

_ALIGN = 32  # what every GGUF file has unless it says otherwise
_ROPE = "rope_freqs.weight"
# llama.cpp's numbers for the type that most weights have (LLAMA_FTYPE_*); tools show them.
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32}
_INSIDE = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")  # go into the metadata


class GgufFile(Container):
    """One .gguf file that llama.cpp loads."""

    def __init__(self, source: Checkpoint, plan: PortPlan, target: Path) -> None:
        """Raises ConfigError for a target that is not called .gguf, Unsupported and CannotHold for the model."""
        if target.suffix != ".gguf":
            raise ConfigError(f"{target}: a GGUF port writes one file; call it {target.name or 'model'}.gguf")
        super().__init__(source, plan, target)
        self.arch = architecture_for(source.config)
        places = self._places()
        self._pieces: dict[str, Piece] = {
            name: piece_of(name, places[name], output, dtype, shape)
            for output in plan.outputs()
            for name, (dtype, shape) in output.tensors.items()
        }

    def layout(self) -> Layout:
        """Header and slots. Raises CannotHold when the experts of a stack differ."""
        pieces = self._pieces | {
            name: Piece(Place(name), "F32", t.dtype, tuple(t.shape)) for name, t in self._extras.items()
        }
        wholes = wholes_of(pieces.values())
        header = self._header(wholes)
        starts, position = {}, len(header)
        for name, whole in wholes.items():
            starts[name] = position
            position += _padded(whole.nbytes)
        slots = {name: _slot(self.target.name, piece, starts[piece.place.name]) for name, piece in pieces.items()}
        return Layout((Shard(self.target.name, header, position),), slots, single=True)

    def extras(self) -> Mapping[str, Tensor]:
        """Llama 3's rotary factors."""
        return self._extras

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Rows in llama.cpp's order; norms, biases and routers in float32."""
        return self._pieces[name].stored(tensor)

    def rearranged(self, name: str) -> str:
        """Which of the differences between Hugging Face's tensors and llama.cpp's a tensor has."""
        piece = self._pieces[name]
        words = ("interleaved", "vector", "expert", "float32")
        place = piece.place
        found = (place.heads > 0, place.column, place.expert is not None, place.single)
        return " ".join(word for word, true in zip(words, found, strict=True) if true)

    def write_files(self, writer: Writer) -> tuple[str, ...]:
        """Nothing: configuration, tokenizer and chat template are in the header."""
        return ()

    def notes(self) -> Iterator[str]:
        """Files that have no place in a GGUF file."""
        yield from self.source.notes()
        left = [f.name for f in self.source.carried_files() if not f.name.startswith(_INSIDE) and f.suffix != ".model"]
        if left:
            yield f"not in the file, because GGUF has no place for them: {', '.join(left)}"

    def _places(self) -> dict[str, Place]:
        names = [name for output in self.plan.outputs() for name in output.tensors]
        found = {name: place_of(self.arch, self.source.config, name) for name in names}
        lost = [name for name, place in found.items() if place is None]
        if lost:
            some = ", ".join(lost[:3]) + (", ..." if len(lost) > 3 else "")
            raise CannotHold(
                f"'{self.plan.target.name}' cannot take {self.source.path}: llama.cpp's architecture '{self.arch}' has "
                f"no place for {len(lost)} of {len(names)} tensors: {some}"
            )
        return {name: place for name, place in found.items() if place is not None}

    @cached_property
    def _extras(self) -> dict[str, Tensor]:
        if _ROPE in self.source.source.infos:
            return {_ROPE: self.source.source.read(_ROPE).float()}
        factors = rope_factors(self.arch, self.source.config)
        return {_ROPE: torch.tensor(factors)} if factors else {}

    def _header(self, wholes: Mapping[str, Whole]) -> bytes:
        """Everything before the first tensor's bytes, padded to the alignment."""
        import gguf
        import numpy as np

        writer = gguf.GGUFWriter(None, self.arch)
        self._add_metadata(writer)
        writer.add_file_type(_FILE_TYPES[_main_kind(wholes)])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, whole in wholes.items():
            kind = gguf.GGMLQuantizationType[whole.kind]
            writer.add_tensor_info(name, whole.shape, np.dtype(np.float32), whole.nbytes, kind)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "header"
            writer.write_header_to_file(file)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            header = file.read_bytes()
        return header + bytes(_padded(len(header)) - len(header))

    def _add_metadata(self, writer: Any) -> None:
        """Of a GGUF file its own, else what config.json and the tokenizer say."""
        if self.source.source.container == "gguf":
            copy_metadata(writer, cast(GgufSource, self.source.source).header.metadata)
            return
        path = self.source.path
        folder = path if path.is_dir() else path.parent
        writer.add_type("model")
        writer.add_name(folder.resolve().name)
        add_config(writer, self.arch, self.source.config)
        made = self.source.contained_files()  # the tokenizer that belongs to another layout, where one was asked for
        with tempfile.TemporaryDirectory() as beside:
            for name, data in made.items():
                Path(beside, name).write_bytes(data)
            rows = self._pieces["model.embed_tokens.weight"].values[0]
            add_tokenizer(writer, self.arch, Path(beside) if "tokenizer.json" in made else folder, rows)


def _slot(file: str, piece: Piece, start: int) -> Slot:
    offset = piece.nbytes * (piece.place.expert or 0)
    return Slot(file, start + offset, piece.nbytes, piece.dtype, piece.shape, piece.place.name, offset)


def _padded(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _main_kind(wholes: Mapping[str, Whole]) -> str:
    """The ggml type of most values in matrices, embeddings apart."""
    counts: Counter[str] = Counter()
    for name, whole in wholes.items():
        if len(whole.shape) > 1 and not name.startswith(("token_embd", "output")):
            counts[whole.kind] += whole.nbytes
    return counts.most_common(1)[0][0] if counts else "F32"
