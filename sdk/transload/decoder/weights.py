"""The weights of a decoder graph: what each module is, and where its bytes lie in the data file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transload.errors import Unsupported
from transload.quant import QuantSpec


@dataclass(frozen=True, slots=True)
class Stored:
    """Bytes [start, start + nbytes) of the data file as a tensor; data_type is ONNX's TensorProto.DataType."""

    data_type: int
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Weights:
    """specs: the quantized modules, [N, K] in `shapes`. tensors: every stored tensor by name.

    A quantized module's tensors are called module.B, module.scales and so on, a float one's module.weight. qdq: the
    quantized modules are (u)int4 or (u)int8 under a DequantizeLinear, called module.codes.
    """

    specs: Mapping[str, QuantSpec]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Stored]
    qdq: bool = False

    def has(self, module: str) -> bool:
        """True when the module has a weight, quantized or float."""
        return module in self.specs or f"{module}.weight" in self.tensors

    def need(self, name: str) -> Stored:
        """A stored tensor. Raises Unsupported when it is missing."""
        if name not in self.tensors:
            raise Unsupported(f"the ONNX graph of this model needs '{name}', which the checkpoint does not have")
        return self.tensors[name]
