"""A port into an ONNX model: the graph, its weights in one file beside it, and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from transload.checkpoint import Checkpoint
from transload.decoder import DecoderShape, Weights, decoder_graph, decoder_shape, genai_config
from transload.decoder.weights import Stored
from transload.formats.onnx_source import DATA_TYPES
from transload.porting.folder import Folder
from transload.porting.plan import PortPlan
from transload.writer import Layout, Shard, Slot, Writer

GRAPH, DATA, GENAI = "model.onnx", "model.onnx.data", "genai_config.json"
_ALIGN = 4096  # onnxruntime maps external data that begins at a page


class OnnxFolder(Folder):
    """A folder that onnxruntime and onnxruntime-genai run: one step of a decoder with its cache."""

    def __init__(self, source: Checkpoint, plan: PortPlan, target: Path) -> None:
        """Raises Unsupported for models that the graph does not compute."""
        super().__init__(source, plan, target)
        self.shape: DecoderShape = decoder_shape(source.config)
        self._graph: bytes = b"" if plan.refusals else self._made_graph()

    def layout(self) -> Layout:
        """Every tensor of the plan in one data file, floats in float32."""
        slots = self._slots
        size = max((slot.start + slot.nbytes for slot in slots.values()), default=0)
        return Layout((Shard(DATA, b"", size),), slots)

    def stored(self, name: str, tensor: Tensor) -> Tensor:
        """Floats in float32, which is what the graph computes in."""
        return tensor.to(self._slots[name].dtype)

    def rearranged(self, name: str) -> str:
        """float32, where the plan has another dtype."""
        planned = self._planned.get(name)
        return "float32" if planned is not None and planned[0] is not self._slots[name].dtype else ""

    def write_files(self, writer: Writer) -> tuple[str, ...]:
        """The graph, genai_config.json, then what every folder has."""
        writer.add_bytes(GRAPH, self._graph)
        files = super().write_files(writer)
        generation = self.source.contained_files().get("generation_config.json")
        found = json.loads(generation) if generation else self.source.source.json("generation_config.json") or {}
        writer.add_json(GENAI, genai_config(self.shape, self.source.config, found))
        return (GRAPH, GENAI, *files)

    def opened(self, folder: Path) -> Path:
        """The graph is what names the weights."""
        return folder / GRAPH

    def notes(self) -> Iterator[str]:
        """What the graph computes in."""
        yield from super().notes()
        positions = self.source.config.get("max_position_embeddings")
        if isinstance(positions, int) and positions > self.shape.context:
            yield f"the graph's rotary tables end at {self.shape.context} of {positions} positions"
        if self.plan.format.name == "onnx-qdq":
            yield "onnxruntime multiplies with int8 activations unless session.qdq_matmulnbits_accuracy_level is 1"
            return
        acts = {"int8 by token and block" if o.spec.act else "float32" for o in self.plan.outputs() if o.spec}
        yield f"the graph multiplies with activations in {' and '.join(sorted(acts)) or 'float32'}"

    @cached_property
    def _planned(self) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        return self.plan.layout()

    @cached_property
    def _slots(self) -> dict[str, Slot]:
        slots, start = {}, 0
        for name, (dtype, dims) in self._planned.items():
            kept = torch.float32 if dtype.is_floating_point else dtype
            nbytes = prod(dims) * kept.itemsize
            slots[name] = Slot(DATA, start, nbytes, kept, dims, name)
            start += -(-nbytes // _ALIGN) * _ALIGN
        return slots

    def _made_graph(self) -> bytes:
        quantized = {o.name: o.spec for o in self.plan.outputs() if o.spec is not None}
        shapes = {e.name.removesuffix(".weight"): e.shape for e in self.source.entries.values()}
        tensors = {n: Stored(DATA_TYPES[s.dtype], s.shape, s.start, s.nbytes) for n, s in self._slots.items()}
        return decoder_graph(self.shape, Weights(quantized, shapes, tensors, self.plan.format.name == "onnx-qdq"), DATA)
