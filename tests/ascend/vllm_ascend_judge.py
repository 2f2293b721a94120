"""Lets vllm-ascend's own quantization classes take a checkpoint: python vllm_ascend_judge.py SOURCE FOLDER RESULT

SOURCE: a folder that has the package vllm_ascend (an unpacked wheel). Only its quantization classes are imported; what
they import of vllm and of the rest of vllm_ascend, which need an NPU, are stand-ins. torch_npu is the real one, so this
runs inside the simulator. FOLDER: a checkpoint. RESULT: a file for the tensors that the classes make after loading.

Raises AssertionError where a stored tensor has another name, shape or dtype than the classes allocate.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

REAL = ("vllm_ascend.quantization.methods.", "vllm_ascend.quantization.quant_type",
        "vllm_ascend.quantization.tp_weight_switch")  # fmt: skip


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of vllm and vllm_ascend that accept everything, but for the quantization classes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        ours = name.split(".")[0] in ("vllm", "vllm_ascend") and not name.startswith(REAL)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = MagicMock(name=spec.name)
        module.__path__ = self.folders.get(spec.name, [])
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass

    def __init__(self, source: Path) -> None:
        folder = source / "vllm_ascend" / "quantization"
        self.folders = {
            "vllm_ascend.quantization": [str(folder)],
            "vllm_ascend.quantization.methods": [str(folder / "methods")],
        }


def configure(description: dict[str, Any]) -> None:
    """What the classes ask their surroundings: one rank, expert parallelism, weights in plain order."""
    config = importlib.import_module("vllm.config")
    config.get_current_vllm_config.return_value = SimpleNamespace(
        quant_config=SimpleNamespace(quant_description=description),
        parallel_config=SimpleNamespace(enable_expert_parallel=True, enable_eplb=False),
        use_v2_model_runner=False,
        model_config=MagicMock(),
        compilation_config=MagicMock(),
    )
    importlib.import_module("vllm.distributed").get_tensor_model_parallel_world_size.return_value = 1
    settings = importlib.import_module("vllm_ascend.ascend_config").get_ascend_config
    settings.return_value.eplb_config.dynamic_eplb = False
    group = importlib.import_module("vllm_ascend.distributed.parallel_state").get_mc2_group
    group.side_effect = AttributeError
    tools = importlib.import_module("vllm_ascend.utils")
    tools.maybe_trans_nz = lambda weight: weight
    tools.COMPRESSED_TENSORS_METHOD, tools.ASCEND_QUANTIZATION_METHOD = "compressed-tensors", "ascend"


def take(allocated: dict[str, Tensor], stored: dict[str, Tensor], where: str, cast: bool) -> torch.nn.Module:
    """A layer with the stored tensors, which must be exactly what the class allocates. cast: loaders cast scales."""
    assert allocated.keys() == stored.keys(), (where, sorted(allocated), sorted(stored))
    layer = torch.nn.Module()
    for name, want in allocated.items():
        assert stored[name].shape == want.shape, (where, name, stored[name].shape, want.shape)
        assert stored[name].dtype == want.dtype or (cast and want.is_floating_point()), (where, name, want.dtype)
        layer.register_parameter(name, torch.nn.Parameter(stored[name].clone(), requires_grad=False))
    return layer


def parts(tensors: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{module}."): t for n, t in tensors.items() if n.rpartition(".")[0] == module}


def main(source: Path, folder: Path, result: Path) -> None:
    sys.meta_path.insert(0, StandIns(source))
    importlib.import_module("torch_npu")
    torch.Tensor.npu = lambda self, *_: self  # type: ignore[attr-defined]  # there is no device to move to
    description = json.loads((folder / "quant_model_description.json").read_text())
    configure(description)
    w4a8 = importlib.import_module("vllm_ascend.quantization.methods.w4a8")
    w8a8 = importlib.import_module("vllm_ascend.quantization.methods.w8a8_dynamic")
    static = importlib.import_module("vllm_ascend.quantization.methods.w8a8_static")
    tensors: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    made: dict[str, Tensor] = {}
    dense = [n.removesuffix(".weight") for n in tensors if n.endswith(".weight") and ".experts." not in n]
    for module in dense:
        kind = description[f"{module}.weight"]
        if kind == "FLOAT":
            continue
        found = parts(tensors, module)
        linear = {"W8A8_DYNAMIC": w8a8.AscendW8A8DynamicLinearMethod, "W8A8": static.AscendW8A8LinearMethod,
                  "W4A8_DYNAMIC": getattr(w4a8, "AscendW4A8DynamicLinearMethod", None)}[kind]()  # fmt: skip
        n, k = found["weight_scale"].shape[0], found["weight"].shape[1]
        allocated = linear.get_weight(k, n, torch.bfloat16) | linear.get_perchannel_param(n, torch.bfloat16)
        row = "row" if module.endswith(("o_proj", "down_proj")) else None
        allocated |= linear.get_pergroup_param(k, n, torch.bfloat16, row)
        if kind == "W8A8":
            allocated |= linear.get_pertensor_param(torch.bfloat16)
            found["input_offset"] = found["input_offset"].to(torch.int8)  # stored as a float; the loader casts it
        bias = found.pop("bias", None)
        assert bias is None or bias.shape == (n,)
        plain = {key: value for key, value in allocated.items() if isinstance(value, Tensor)}
        layer = take(plain, found, module, cast=True)
        linear.process_weights_after_loading(layer)
        made |= {f"{module}.{name}": t.data.contiguous() for name, t in layer.named_parameters()}
    for head in sorted({n.partition(".experts.")[0] for n in tensors if ".experts." in n}):
        moe = w4a8.AscendW4A8DynamicFusedMoEMethod()
        count = 1 + max(int(m[1]) for n in tensors if (m := re.match(re.escape(head) + r"\.experts\.(\d+)\.", n)))
        each = [
            {p: parts(tensors, f"{head}.experts.{e}.{p}_proj") for p in ("gate", "up", "down")} for e in range(count)
        ]
        fused = {f"w13_{key}": torch.stack([torch.cat([x["gate"][key], x["up"][key]]) for x in each])
                 for key in each[0]["gate"]}  # fmt: skip
        fused |= {f"w2_{key}": torch.stack([x["down"][key] for x in each]) for key in each[0]["down"]}
        hidden, width = each[0]["gate"]["weight"].shape[1], each[0]["gate"]["weight_scale"].shape[0]
        allocated = moe.get_weight(count, width, hidden, torch.bfloat16)
        allocated |= moe.get_dynamic_quant_param(count, width, hidden, torch.bfloat16)
        layer = take(allocated, fused, head, cast=False)
        moe.process_weights_after_loading(layer)
        made |= {f"{head}.{name}": t.data.contiguous() for name, t in layer.named_parameters()}
    save_file(made, result)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
    sys.stdout.flush()
    os._exit(0)  # torch_npu's shutdown calls CANN, and the stubs are not made for it
