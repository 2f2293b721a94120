"""Building an ONNX graph node by node, with weights that lie in a file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from transload.decoder.weights import Stored

Values = dict[str, tuple[int, Sequence[object]]]  # name -> TensorProto.DataType and dimensions
CONTRIB = "com.microsoft"
OPSETS = (("", 21), (CONTRIB, 1))


class GraphBuilder:
    """Nodes and initializers in order. Every method that adds a node returns the name of its first output."""

    def __init__(self, data_file: str) -> None:
        self._file = data_file
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        outputs: Sequence[str] = (),
        domain: str = "",
        **attributes: int | float,
    ) -> str:
        """A node called `name`; its outputs are called after it unless given."""
        from onnx import helper

        outs = list(outputs) or [f"{name}/out"]
        given = list(inputs)
        while given and not given[-1]:
            given.pop()
        self._nodes.append(helper.make_node(op, given, outs, name=name, domain=domain, **attributes))
        return outs[0]

    def constant(self, values: Sequence[int], name: str) -> str:
        """int64 values, as a node: initializers are weights."""
        from onnx import helper

        tensor = helper.make_tensor(f"{name}/value", 7, [len(values)], list(values))
        self._nodes.append(helper.make_node("Constant", [], [name], name=f"{name}/Constant", value=tensor))
        return name

    def weight(self, name: str, at: Stored, shape: Sequence[int] | None = None) -> str:
        """A tensor of the data file under a name, perhaps in another shape of as many bytes."""
        if name not in self._initializers:
            import onnx

            dims = at.shape if shape is None else shape
            found = onnx.TensorProto(name=name, data_type=at.data_type, dims=dims, data_location=1)
            for key, value in (("location", self._file), ("offset", at.start), ("length", at.nbytes)):
                found.external_data.add(key=key, value=str(value))
            self._initializers[name] = found
        return name

    def table(self, name: str, values: Tensor) -> str:
        """A float32 table inside the graph's own file."""
        from onnx import numpy_helper

        self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(values.numpy()), name)
        return name

    def model(self, inputs: Values, outputs: Values, doc: str) -> bytes:
        """The serialized ModelProto."""
        from onnx import ModelProto, helper

        values = [
            [helper.make_tensor_value_info(name, kind, list(dims)) for name, (kind, dims) in side.items()]
            for side in (inputs, outputs)
        ]
        graph = helper.make_graph(self._nodes, "decoder", *values, list(self._initializers.values()), doc_string=doc)
        opsets = [helper.make_opsetid(domain, version) for domain, version in OPSETS]
        model = helper.make_model(graph, opset_imports=opsets, producer_name="transload", ir_version=10)
        return bytes(ModelProto.SerializeToString(model))
