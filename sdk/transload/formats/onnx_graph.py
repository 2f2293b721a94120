"""Where the quantized linears of an ONNX graph are: nodes, attributes and the names of their initializers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transload.errors import FormatError
from transload.headers import TensorInfo
from transload.headers.info import shown

Infos = Mapping[str, TensorInfo]

_BITS = (2, 4, 8)
_CODES = ("U4", "I4", "U8", "I8")
_ENDING = re.compile(r"(MatMul(NBits)?|Gemm)(_matmul)?(_Q\d)?")  # of node names, not of modules


@dataclass(frozen=True, slots=True)
class Linear:
    """One quantized linear of a graph, by the names of its initializers ("" where there is none)."""

    module: str
    nbits: bool  # a MatMulNBits node, else a DequantizeLinear
    codes: str
    scales: str
    zeros: str
    g_idx: str = ""
    n: int = 0
    k: int = 0
    bits: int = 0
    block: int = 0  # 0: one scale per output
    axis: int = 0
    transposed: bool = False  # a DequantizeLinear over [N, K] instead of [K, N]
    int8: bool = False  # MatMulNBits may quantize activations to int8: accuracy level 4

    def tensors(self) -> Iterator[str]:
        """Names of its initializers."""
        yield from (name for name in (self.codes, self.scales, self.zeros, self.g_idx) if name)


def find_linears(path: Path, graph: Any, infos: Infos) -> dict[str, Linear]:
    """Every quantized linear of a GraphProto by module name. Raises FormatError for attributes that make no weight."""
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    found: dict[str, Linear] = {}
    shared = _shared(graph, infos)
    for node in graph.node:
        linear = None
        if node.op_type == "MatMulNBits" and len(node.input) > 2 and node.input[1] in infos:
            linear = None if node.input[1] in shared else _nbits(path, node)
        elif node.op_type == "GatherBlockQuantized" and len(node.input) > 2 and node.input[0] in infos:
            linear = _embedding(path, node, infos)
        elif node.op_type == "DequantizeLinear" and node.input and node.input[0] in infos:
            linear = _dequantize(path, node, infos, consumers)
        if linear is not None:
            if linear.module in found:
                raise FormatError(f"{path}: two quantized nodes are called {shown(linear.module)}")
            found[linear.module] = linear
    return found


def find_tables(graph: Any, infos: Infos) -> set[str]:
    """Initializers that are no weights: rotary tables, and a tied head's name for the embedding's bytes."""
    rotary = {name for node in graph.node if node.op_type == "GroupQueryAttention" for name in node.input[7:9] if name}
    return (rotary | _shared(graph, infos)) & infos.keys()


def _shared(graph: Any, infos: Infos) -> set[str]:
    """Codes of MatMulNBits nodes that are an embedding's bytes once more: a head tied to it has no own numbers."""
    tables = [n.input[0] for n in graph.node if n.op_type == "GatherBlockQuantized" and n.input and n.input[0] in infos]
    places = {(infos[name].file, infos[name].start) for name in tables}
    codes = [n.input[1] for n in graph.node if n.op_type == "MatMulNBits" and len(n.input) > 2 and n.input[1] in infos]
    return {name for name in codes if name not in tables and (infos[name].file, infos[name].start) in places}


def _embedding(path: Path, node: Any, infos: Infos) -> Linear | None:
    """A GatherBlockQuantized over rows of uint8 codes."""
    info, values = infos[node.input[0]], {a.name: a.i for a in node.attribute}
    b, block = values.get("bits", 4), values.get("block_size", 128)
    if info.dtype != "U8" or len(info.shape) != 2 or values.get("gather_axis", 0) != 0:
        return None
    module = _module_name(node, info.name)
    n, k = info.shape[0], info.shape[1] * 8 // b if b in _BITS else 0
    if not (0 < n < 1 << 31 and 0 < k < 1 << 31 and 0 < block < 1 << 31 and k % block == 0):
        raise FormatError(f"{path}: node {shown(module)} has bits={b}, block_size={block} over {info.shape}")
    inputs = [*node.input, ""]
    return Linear(module, True, inputs[0], inputs[2], inputs[3], "", n, k, b, block)


def _nbits(path: Path, node: Any) -> Linear:
    values = {a.name: a.i for a in node.attribute}
    inputs = [*node.input, "", "", "", ""]
    module = _module_name(node, inputs[1])
    n, k, b, block = (values.get(key, default) for key, default in (("N", 0), ("K", 0), ("bits", 4), ("block_size", 0)))
    if not (0 < n < 1 << 31 and 0 < k < 1 << 31 and b in _BITS and 0 < block < 1 << 31 and block * b % 8 == 0):
        raise FormatError(
            f"{path}: node {shown(module)} has N={n}, K={k}, bits={b}, block_size={block}, which make no weight"
        )
    int8 = values.get("accuracy_level", 0) == 4
    return Linear(module, True, inputs[1], inputs[2], inputs[3], inputs[4], n, k, b, block, int8=int8)


def _dequantize(path: Path, node: Any, infos: Infos, consumers: dict[str, list[Any]]) -> Linear | None:
    """A DequantizeLinear whose result is the second input of a MatMul or Gemm, perhaps through a Transpose."""
    info = infos[node.input[0]]
    if info.dtype not in _CODES or len(info.shape) != 2 or len(node.input) < 2:
        return None
    user, transposed = _user(node.output[0], consumers)
    if user is None:
        return None
    values = {a.name: a.i for a in node.attribute}
    axis, block = values.get("axis", 1), values.get("block_size", 0)
    module = _module_name(user, node.input[0])
    if axis not in (0, 1, -1, -2) or not 0 <= block < 1 << 31:
        raise FormatError(f"{path}: node {shown(module)} has axis={axis}, block_size={block}")
    n, k = info.shape if transposed else info.shape[::-1]
    zeros = node.input[2] if len(node.input) > 2 else ""
    width = 4 if info.dtype.endswith("4") else 8
    names = (info.name, node.input[1], zeros)
    return Linear(module, False, *names, "", n, k, width, block, axis % 2, transposed)


def _user(output: str, consumers: dict[str, list[Any]]) -> tuple[Any, bool]:
    transposed = False
    users = consumers.get(output, [])
    if len(users) == 1 and users[0].op_type == "Transpose":
        output, transposed = users[0].output[0], True
        users = consumers.get(output, [])
    for user in users:
        if user.op_type in ("MatMul", "Gemm") and len(user.input) > 1 and user.input[1] == output:
            flipped = user.op_type == "Gemm" and any(a.name == "transB" and a.i for a in user.attribute)
            return user, transposed != flipped
    return None, False


def _module_name(node: Any, weight: str) -> str:
    """A module's name from its node's: /model/layers.0/attn/q_proj/MatMulNBits is model.layers.0.self_attn.q_proj.

    Exporters write paths of modules, and call attention attn. Nodes without a name have their weight's. A name that is
    no path is a module's already.
    """
    if node.name and "/" not in node.name:
        return str(node.name)
    parts = [p for p in (node.name or weight).replace("/", ".").split(".") if p]
    while len(parts) > 1 and _ENDING.fullmatch(parts[-1]):
        parts.pop()
    if len(parts) > 1 and parts[-2] == "attn":
        parts[-2] = "self_attn"
    return ".".join(parts) or weight
