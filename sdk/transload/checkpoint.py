"""A checkpoint of any format, opened lazily: headers now, numbers when they are asked for.

>>> checkpoint = transload.open("Qwen3-8B-AWQ")
>>> checkpoint["model.layers.0.mlp.up_proj"].spec.group_size
128
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from torch import Tensor

from transload.errors import ConfigError, Unsupported
from transload.formats import FORMATS
from transload.formats.activations import activation_notes
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.formats.plain import declared_quantization
from transload.headers.info import shown
from transload.layouts import hints, relaid
from transload.quant import QTensor, QuantSpec
from transload.source import open_source

# What belongs to a model besides weights, config.json and descriptions of quantization, as glob patterns.
CARRIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken",
    "*.jinja", "chat_template.json", "generation_config.json", "*processor_config.json", "configuration.json",
    "LICENSE*", "NOTICE*", "*.txt",
)  # fmt: skip


class Checkpoint:
    """One model on disk.

    path: what was opened. source: its stored tensors. format: who reads them. config: config.json, or what the
    container says in its place. entries: everything in it by Hugging Face name, quantized linears by module name, other
    tensors by their own.
    """

    def __init__(self, source: Source, format: Format) -> None:
        self.source, self.format = source, format
        self.path: Path = source.path
        self.config: Json = format.config(source)
        self.entries: dict[str, Entry] = format.entries(source)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._find(name) is not None

    def __getitem__(self, name: str) -> QTensor | Tensor:
        """A linear by module name, quantized or float, or any tensor by its full name.

        Raises ConfigError with the nearest names when there is none.
        """
        entry = self.entry(name)
        return self.read(entry) if entry.spec is None else self.decode(entry)

    def __repr__(self) -> str:
        return f"<Checkpoint {self.path} {self.format.name}, {len(self.entries)} entries>"

    def entry(self, name: str) -> Entry:
        """The entry of a module or tensor name. Raises ConfigError with the nearest names when there is none."""
        entry = self._find(name)
        if entry is None:
            near = _nearest(name, self.entries)
            raise ConfigError(f"{self.path}: no module or tensor {shown(name)}; {near}")
        return entry

    def modules(self) -> dict[str, QuantSpec | None]:
        """Every linear by module name; None stands for one whose weight is float.

        Float linears are 2-D and 3-D `.weight` tensors other than embeddings, and stacks of experts.
        """
        specs: dict[str, QuantSpec | None] = {}
        for name, entry in self.entries.items():
            if entry.spec is not None:
                specs[name] = entry.spec
            elif _is_linear(entry):
                specs[name.removesuffix(".weight")] = None
        return specs

    def decode(self, entry: Entry) -> QTensor:
        """The exact numbers of a quantized entry. Raises FormatError naming file and module."""
        if entry.spec is None:
            raise ConfigError(f"{self.path}: {shown(entry.name)} is not quantized: read it")
        with naming(self.source, entry):
            return self.format.decode(self.source, entry)

    def read(self, entry: Entry) -> Tensor:
        """The tensor of a float entry. Raises FormatError naming file and tensor."""
        if entry.spec is not None:
            raise ConfigError(f"{self.path}: {shown(entry.name)} is quantized: decode it")
        return self.format.read(self.source, entry)

    def notes(self) -> list[str]:
        """What is not among the entries, and what is to be known about the layout, in sentences."""
        told = activation_notes(self.source, self.entries.values())
        return [*self.format.notes(self.source), *told, *hints(self.config)]

    def contained_files(self) -> dict[str, bytes]:
        """Files by name that the container itself holds: tokenizer and settings of a GGUF file."""
        return self.format.files(self.source)

    def experts(self, entry: Entry) -> Iterator[QTensor | Tensor]:
        """The experts of a stacked entry [E, N, K], one in memory at a time where the container allows it."""
        with naming(self.source, entry):
            yield from self.format.experts(self.source, entry)

    def carried_files(self) -> list[Path]:
        """Tokenizer, chat template, generation and processor settings, licence: what a port copies as it is."""
        return [] if self._folder is None else _matching(self._folder, CARRIED)

    def custom_code(self) -> list[Path]:
        """Python files beside the weights: listed, never copied or run. Trusting them is the user's choice."""
        return [] if self._folder is None else _matching(self._folder, ("*.py",))

    @cached_property
    def _folder(self) -> Path | None:
        if self.source.container == "gguf":
            return None
        return self.path if self.path.is_dir() else self.path.parent

    def _find(self, name: str) -> Entry | None:
        candidates = (name, f"{name}.weight", name.removesuffix(".weight"))
        return next((self.entries[c] for c in candidates if c in self.entries), None)


def open(path: str | Path, layout: str = "stored") -> Checkpoint:
    """Opens the checkpoint at a path: a folder, a .safetensors file or a .gguf file. Reads headers and JSON only.

    layout: "stored" shows the names that are on disk; "native" those of transformers' own class where the checkpoint is
    in ChatGLM's layout (ChatGLM2/3, GLM-4-9b); "remote" ChatGLM's, for a checkpoint of the native class. Rows are cut
    and joined when they are read, and no number changes.

    Raises FormatError for broken files, and Unsupported when the checkpoint declares a quantization that no format
    here reads.
    """
    source = open_source(path)
    for format in FORMATS:
        if format.container == source.container and format.detects(source):
            return Checkpoint(source, relaid(source, format, layout))
    names = ", ".join(f.name for f in FORMATS)
    declared = declared_quantization(source) or source.container
    raise Unsupported(f"{source.path}: quantized by {shown(declared)}, which no format here reads; there are {names}")


def _is_linear(entry: Entry) -> bool:
    """A float weight that multiplies activations, as far as names and shapes tell."""
    module, _, last = entry.name.rpartition(".")
    if last == "weight":
        return len(entry.shape) in (2, 3) and "emb" not in module.rpartition(".")[2]
    return len(entry.shape) == 3 and module.endswith("experts") and not last.endswith("bias")


def _nearest(name: str, entries: Mapping[str, Entry]) -> str:
    """Up to three similar names; names with the same last part are compared first, as similarity is slow to compute."""
    last = name.rpartition(".")[2]
    pool = [n for n in entries if n.endswith(last)] or list(entries)
    near = get_close_matches(name, pool[:3000], n=3, cutoff=0.5) or list(entries)[:3]
    return "the nearest are " + ", ".join(near) if near else "it is empty"


def _matching(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(p for p in found if not p.name.startswith(".") and p.suffix not in (".safetensors", ".gguf", ".bin"))
