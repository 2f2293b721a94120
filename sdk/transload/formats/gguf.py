"""GGUF files as Hugging Face checkpoints: names, row orders and exact numbers.

Every block-quantized matrix is a quantized entry, the embedding table too (`model.embed_tokens`). A stack of experts is
one entry [E, N, K] under the name of its module (`model.layers.0.mlp.experts.up_proj`). What is encoded here are the
blocks of one matrix; the file around them, with llama.cpp's names and row orders, is `porting.gguf_file`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Protocol, TypeVar, cast

import torch
from torch import Tensor

from transload.errors import FormatError, Unsupported
from transload.formats.base import Entry, Format, Json, Source, naming
from transload.formats.gguf_blocks import BLOCKS, block_of, decode_blocks
from transload.formats.gguf_encode import GROUP, encode_blocks
from transload.formats.limits import divided, integer_limits, positional, weights_only
from transload.headers import GgufHeader, TensorInfo
from transload.headers.info import shown
from transload.models.gguf_assets import tokenizer_files
from transload.models.gguf_config import hf_config
from transload.models.gguf_names import Part, number, parts
from transload.quant import QTensor, QuantSpec, Zero

T = TypeVar("T")

_FLOATS = ("F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64")
_ROPE = "rope_freqs.weight"  # rotary factors, which config.json says in other words
_KV_B = (".attn_k_b.weight", ".attn_v_b.weight")  # MLA's kv_b_proj, split per head and k transposed


class Gguf(Format):
    """llama.cpp's container, any architecture of `models.gguf_names`."""

    name: ClassVar[str] = "gguf"
    container: ClassVar[str] = "gguf"
    group_size: ClassVar[int | None] = GROUP
    embeddings: ClassVar[bool] = True

    def detects(self, source: Source) -> bool:
        """True for every GGUF file."""
        return source.container == "gguf"

    def config(self, source: Source) -> Json:
        """config.json, built from the metadata and the tensors."""
        factors = source.read(_ROPE).flatten().tolist() if _ROPE in source.infos else []
        return _naming_file(source, lambda: hf_config(metadata_of(source), source.infos, factors))

    def files(self, source: Source) -> dict[str, bytes]:
        """Tokenizer, chat template and generation settings, built from the metadata."""
        return _naming_file(source, lambda: tokenizer_files(metadata_of(source)))

    def entries(self, source: Source) -> dict[str, Entry]:
        """Every tensor under its Hugging Face name.

        Raises FormatError for block types that are not decoded and for names that the architecture does not have,
        Unsupported for architectures whose names are not known.
        """
        found: dict[str, Entry] = {}
        for info in source.infos.values():
            for entry in _entries_of(metadata_of(source), info):
                if entry.name in found:
                    raise FormatError(
                        f"{info.file}: tensors {found[entry.name].tensors} and {info.name} are both {entry.name}"
                    )
                found[entry.name] = entry
        return found | _split_kv_b(source)

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """The exact numbers, rows in Hugging Face's order."""
        with naming(source, entry):
            info, part = _stored(source, entry, f"{entry.name}.weight")
            raw = _place_rows(source.read(info.name), part)
            return decode_blocks(info.dtype, raw, info.shape[-1])

    def read(self, source: Source, entry: Entry) -> Tensor:
        """A float tensor, rows and shape as Hugging Face has them."""
        with naming(source, entry):
            if len(entry.tensors) == 2:
                return _join_kv_b(source, entry)
            info, part = _stored(source, entry, entry.name)
            tensor = _place_rows(source.read(info.name), part)
            return tensor.unsqueeze(0) if part.column else tensor

    def experts(self, source: Source, entry: Entry) -> Iterator[QTensor | Tensor]:
        """The experts of a stack, each read from its own place in the file."""
        info = source.infos[entry.tensors[0]]
        for e in range(entry.shape[0]):
            raw = cast(GgufSource, source).read_expert(info.name, e)
            yield raw if entry.spec is None else decode_blocks(info.dtype, raw, info.shape[-1])

    def cannot_hold(self, spec: QuantSpec, shape: tuple[int, ...]) -> str | None:
        """Q4_0 to Q8_0: groups of 32 with float16 scales, symmetric or, with 4 and 5 bits, with minimums."""
        bits = (4, 5) if spec.zero is Zero.MINS else (4, 5, 8)
        reason = integer_limits(spec, shape, bits, (Zero.MIDPOINT, Zero.MINS), (torch.float16,)) or weights_only(spec)
        reason = reason or positional(spec)
        if reason is None and spec.group_size != GROUP:
            return f"its blocks are groups of {GROUP}, not {spec.group_size}"
        return reason or divided(spec, shape[1])

    def encode(self, name: str, w: QTensor) -> dict[str, Tensor]:
        """The blocks of one matrix under its Hugging Face name, rows in Hugging Face's order."""
        return {f"{name}.weight": encode_blocks(w)}


class GgufSource(Protocol):
    """What a GGUF file offers besides a Source's tensors."""

    header: GgufHeader

    def read_expert(self, name: str, index: int) -> Tensor:
        """One expert of a stored stack."""


def metadata_of(source: Source) -> Mapping[str, object]:
    """The metadata of a GGUF source."""
    return cast(GgufSource, source).header.metadata


def _naming_file(source: Source, build: Callable[[], T]) -> T:
    try:
        return build()
    except (FormatError, Unsupported) as e:
        raise type(e)(f"{source.path}: {e}") from e


def _entries_of(metadata: Mapping[str, object], info: TensorInfo) -> Iterator[Entry]:
    if info.name.endswith(_KV_B):
        return
    try:
        places = parts(metadata, info.name, info.shape)
    except FormatError as e:
        raise FormatError(f"{info.file}: {e}") from e
    for part in places:
        n = part.rows[1] - part.rows[0] if part.rows else info.shape[0]
        shape = (1, *info.shape) if part.column else (n, *info.shape[1:])
        size = info.nbytes * n // max(info.shape[0], 1)
        if info.dtype in _FLOATS:
            yield Entry(part.name, None, shape, (info.name,), size, info.dtype)
            continue
        with _blaming(info):
            spec = block_of(info.dtype).spec
            if len(shape) < 2 or not part.name.endswith(".weight"):
                raise FormatError(f"a block type for {part.name} {shape}, expected a matrix of weights")
        yield Entry(part.name.removesuffix(".weight"), spec, shape, (info.name,), size)


class _blaming:
    """Puts file and stored tensor in front of a FormatError."""

    def __init__(self, info: TensorInfo) -> None:
        self._info = info

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FormatError):
            raise FormatError(f"{self._info.file}: tensor {shown(self._info.name)}: {error}") from error


def _stored(source: Source, entry: Entry, full_name: str) -> tuple[TensorInfo, Part]:
    info = source.infos[entry.tensors[0]]
    places = parts(metadata_of(source), info.name, info.shape)
    return info, next(p for p in places if p.name == full_name)


def _place_rows(tensor: Tensor, part: Part) -> Tensor:
    """Takes a part's rows and puts the rows of every head back in order; packed rows move as they are."""
    if part.rows:
        tensor = tensor[part.rows[0] : part.rows[1]]
    if not part.heads:
        return tensor
    n = tensor.shape[0]
    if n % (2 * part.heads):
        raise FormatError(f"{n} rows do not divide into {part.heads} heads of two halves")
    # llama.cpp stores row i of the first half, row i of the second, row i + 1 of the first, ...
    order = torch.arange(n).reshape(part.heads, n // part.heads // 2, 2).transpose(1, 2).flatten()
    return tensor[order]


def _split_kv_b(source: Source) -> dict[str, Entry]:
    """MLA's kv_b_proj where llama.cpp split it: the transposed half has other blocks, so it becomes a float tensor."""
    found = {}
    for name, info in source.infos.items():
        if not name.endswith(_KV_B[0]):
            continue
        pair = (name, name.replace(*_KV_B))
        if pair[1] not in source.infos:
            raise FormatError(f"{info.file}: tensor {shown(name)} has no {shown(pair[1])} beside it")
        k_b, v_b = info, source.infos[pair[1]]
        module = parts(metadata_of(source), name.replace(_KV_B[0], ".attn_kv_b.weight"), info.shape)[0].name
        heads, rank = (
            number(metadata_of(source), "attention.head_count"),
            number(metadata_of(source), "attention.kv_lora_rank"),
        )
        if k_b.shape[:2] != (heads, rank) or v_b.shape[::2] != (heads, rank) or len(k_b.shape) != 3:
            raise FormatError(
                f"{info.file}: {name} {k_b.shape} and {pair[1]} {v_b.shape} are no halves of {heads} heads"
            )
        shape = (heads * (k_b.shape[2] + v_b.shape[1]), rank)
        found[module] = Entry(module, None, shape, pair, k_b.nbytes + v_b.nbytes, "F32")
    return found


def _join_kv_b(source: Source, entry: Entry) -> Tensor:
    """k_b [heads, rank, nope] and v_b [heads, v, rank] as kv_b_proj.weight float32 [heads * (nope + v), rank]."""
    k_b, v_b = (_as_float(source, source.infos[name]) for name in entry.tensors)
    return torch.cat([k_b.transpose(1, 2), v_b], dim=1).reshape(entry.shape)


def _as_float(source: Source, info: TensorInfo) -> Tensor:
    raw = source.read(info.name)
    return decode_blocks(info.dtype, raw, info.shape[-1]).dequantize() if info.dtype in BLOCKS else raw.float()
