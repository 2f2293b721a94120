"""Runs in vLLM's own Python: which kernel vLLM chooses with Transload's plug-in, and what it computes. Prints JSON."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

from transload.bits import pack
from transload.quant import QuantSpec, Zero
from transload.reference import dequantize, quantize_rtn


def parameter(data: torch.Tensor, **axes: int) -> torch.nn.Parameter:
    """A tensor with the axes that vLLM's parameters know."""
    out = torch.nn.Parameter(data, requires_grad=False)
    for name, value in axes.items():
        setattr(out, name, value)
    return out


def judged(kernel: Any, config: Any, bits: int, w4a8: str) -> dict[str, object]:
    """The error of a random layer against the reference, and whether torch.compile leaves the result as it is."""
    os.environ["TRANSLOAD_VLLM_W4A8"] = w4a8
    k, n = config.partition_weight_shape
    zero = Zero.CODES if config.zero_points else Zero.MIDPOINT
    torch.manual_seed(0)
    weight = quantize_rtn(
        torch.randn(n, k), QuantSpec(bits=bits, group_size=config.group_size, zero=zero, scale_dtype=torch.bfloat16)
    )
    layer = SimpleNamespace(
        weight_packed=parameter(pack(weight.codes, bits, torch.int32), input_dim=1, output_dim=0, packed_dim=1),
        weight_scale=parameter(weight.scales, input_dim=1, output_dim=0),
        weight_zero_point=None,
    )
    if weight.zeros is not None:
        words = pack(weight.zeros.t().contiguous(), bits, torch.int32).t().contiguous()
        layer.weight_zero_point = parameter(words, input_dim=1, output_dim=0, packed_dim=0)
    made = kernel(config, "weight_packed", "weight_scale", "weight_zero_point")
    made.process_weights_after_loading(layer)
    x, bias = torch.randn(2, 3, k, dtype=torch.bfloat16), torch.randn(n, dtype=torch.bfloat16)
    found = made.apply_weights(layer, x, bias)
    truth = x.double() @ dequantize(weight).double().t() + bias.double()
    compiled = torch.compile(lambda y: made.apply_weights(layer, y, bias), backend="eager", fullgraph=True)(x)
    nmse = float(((found.double() - truth) ** 2).sum() / (truth**2).sum())
    return {"shape": list(found.shape), "nmse": nmse, "compiled_equal": bool(torch.equal(compiled, found))}


def main() -> None:
    import vllm.plugins
    from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
    from vllm.scalar_type import scalar_types

    vllm.plugins.load_general_plugins()
    types = {"uint4b8": scalar_types.uint4b8, "uint4": scalar_types.uint4, "uint8b128": scalar_types.uint8b128}
    answers = []
    for name, group, n, k in json.loads(sys.argv[1]):
        bits, zeros = types[name].size_bits, name == "uint4"
        config = MPLinearLayerConfig((k, n), (k, n), types[name], torch.bfloat16, group, zeros)
        try:
            kernel = choose_mp_linear_kernel(config)
        except ValueError as error:
            answers.append({"kernel": None, "error": str(error)})
            continue
        answer: dict[str, object] = {"kernel": kernel.__name__}
        if kernel.__name__ == "TransloadLinearKernel":
            answer |= {"W_A16": judged(kernel, config, bits, "0"), "W_A8": judged(kernel, config, bits, "1")}
        answers.append(answer)
    print(json.dumps(answers))


main()
