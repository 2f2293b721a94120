"""A Source in memory, so that readers are tested without files; and the same tensors as a folder on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from transload.errors import FormatError
from transload.formats.base import Entry, Format, Json
from transload.headers import TensorInfo
from transload.quant import QTensor, QuantSpec
from transload.source import DTYPE_NAMES

GOLDEN = Path(__file__).parents[1] / "golden"


class MemorySource:
    """Tensors and JSON files by name, as open_source would show them."""

    def __init__(self, tensors: Mapping[str, Tensor], config: Json, files: Mapping[str, Json] | None = None) -> None:
        self.path = Path("memory")
        self.container = "safetensors"
        self.config = config
        self.tensors = dict(tensors)
        self.files = dict(files or {})
        self.infos = {
            name: TensorInfo(name, DTYPE_NAMES[t.dtype], tuple(t.shape), Path("memory.safetensors"), 0, t.nbytes)
            for name, t in self.tensors.items()
        }

    def read(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise FormatError(f"memory: no tensor {name}")
        return self.tensors[name].clone()

    def json(self, name: str) -> Json | None:
        return self.files.get(name)

    def save(self, folder: Path) -> Path:
        """The same checkpoint as files."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.tensors, folder / "model.safetensors")
        for name, value in {"config.json": self.config, **self.files}.items():
            (folder / name).write_text(json.dumps(value))
        return folder


def golden(name: str, module: str = "model.layers.0.mlp.up_proj") -> tuple[MemorySource, dict[str, Tensor]]:
    """A golden checkpoint of one linear, and every tensor of the file."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    facts = json.loads((GOLDEN / f"{name}.json").read_text())
    stored = {f"{module}.{k.removeprefix('ckpt.')}": t for k, t in tensors.items() if k.startswith("ckpt.")}
    return MemorySource(stored, {"quantization_config": facts["quantization_config"]}), tensors


def written(
    fmt: Format, weights: Mapping[str, QTensor], floats: Mapping[str, tuple[int, ...]] | None = None
) -> MemorySource:
    """What `fmt` writes for some modules, as a source."""
    tensors: dict[str, Tensor] = {}
    for name, w in weights.items():
        reason = fmt.cannot_hold(w.spec, tuple(w.codes.shape))
        assert reason is None, reason
        tensors |= fmt.encode(name, w)
    left = {f"{name}.weight": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in (floats or {}).items()}
    specs = {name: w.spec for name, w in weights.items()}
    files = fmt.finish(specs, floats or {})
    for name, value in fmt.describe(specs, list(left)).items():
        files[name] = {**files.get(name, {}), **value}
    return MemorySource(tensors | left, files.pop("config.json", {}), files)


def decoded(fmt: Format, source: MemorySource) -> dict[str, QTensor]:
    """Every quantized module of a source."""
    assert fmt.detects(source)
    return {name: fmt.decode(source, e) for name, e in fmt.entries(source).items() if e.spec is not None}


def only(fmt: Format, source: MemorySource) -> tuple[Entry, QTensor]:
    """The one quantized module of a source."""
    (found,) = [e for e in fmt.entries(source).values() if e.spec is not None]
    return found, fmt.decode(source, found)


def random_weight(spec: QuantSpec, n: int, k: int, seed: int = 0) -> QTensor:
    """A weight with every code, random scales of both signs and random zeros."""
    g = torch.Generator().manual_seed(seed)
    groups, top = spec.groups(k), 1 << spec.bits
    codes = torch.randint(0, top, (n, k), dtype=torch.uint8, generator=g)
    scales = (torch.rand(n, groups, generator=g) + 0.01).to(spec.scale_dtype)
    zero = spec.zero.value
    zeros = torch.randint(0, top, (n, groups), dtype=torch.uint8, generator=g) if zero == "codes" else None
    if zero == "floats":
        zeros = (torch.rand(n, groups, generator=g) * top).to(spec.scale_dtype)
    mins = -torch.rand(n, groups, generator=g).to(spec.scale_dtype) if zero == "mins" else None
    g_idx = None
    if spec.act_order:
        g_idx = (torch.randperm(k, generator=g) // spec.group_size).to(torch.int32)
    return QTensor(spec, codes, scales, zeros, mins, g_idx)
