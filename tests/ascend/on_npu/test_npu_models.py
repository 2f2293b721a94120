"""Whole models: loaded with device="npu", their logits against the same checkpoint on the CPU.

Both run in bfloat16 with the same transformers code; what differs is the kernels. Argmax may differ where two logits
are closer than bfloat16 can tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from npu_under_test import NPU
from tiny_moe import make
from torch import Tensor

import transload
from transload import hal
from transload.runtime import TransloadConfig, report
from transload.testing import nmse

BF16 = torch.bfloat16

# bfloat16 rounds some thirty times between the embedding and the logits, 2e-6 each. Under W4A8 the CPU's dense layers
# have int8 activations where the NPU's have bfloat16, 1e-4 a layer. A wrong layer costs 0.1 and more.
TOLERANCE = {"w4a16": 4e-4, "w4a8": 3e-3}


@pytest.fixture(autouse=True)
def _npu_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """`device="npu"` means the device under test, which may be the simulated one."""
    monkeypatch.setitem(hal.backends(), "ascend", NPU.backend)  # type: ignore[arg-type]


def _logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids.to(next(model.parameters()).device)).logits.float().cpu()


def _compare(folder: Path, quantize: TransloadConfig | None, scheme: str | None) -> tuple[float, Counter[str]]:
    """Error of the NPU's logits against the CPU's, and which kernels ran how many modules."""
    ids = torch.randint(0, 80, (2, 12), generator=torch.Generator().manual_seed(1))
    on_npu = transload.load(folder, device="npu", dtype=BF16, quantize=quantize, scheme=scheme)
    on_cpu = transload.load(folder, device="cpu", dtype=BF16, quantize=quantize, scheme=scheme)
    kernels = Counter(f"{m.kernel} {m.requested}->{m.executed}" for m in report(on_npu).modules)
    return nmse(_logits(on_npu, ids), _logits(on_cpu, ids)), kernels


def _groups() -> TransloadConfig:
    return TransloadConfig(bits=4, group_size=32, scale_dtype="bfloat16")


def _channels() -> TransloadConfig:
    return TransloadConfig(bits=4, group_size=-1, scale_dtype="float32")


CASES: list[tuple[str, Callable[[], TransloadConfig], str, dict[str, int]]] = [
    ("qwen3-moe", _groups, "w4a16", {"ascend-w4a16 W4A16->W4A16": 15, "ascend-grouped-w4a16 W4A16->W4A16": 4}),
    ("glm4-moe", _groups, "w4a16", {"ascend-w4a16 W4A16->W4A16": 21, "ascend-grouped-w4a16 W4A16->W4A16": 4}),
    ("qwen3-moe", _channels, "w4a8", {"ascend-w4a16 W4A8->W4A16": 15, "ascend-grouped-w4a8 W4A8->W4A8": 4}),
    ("glm4-moe", _channels, "w4a8", {"ascend-w4a16 W4A8->W4A16": 21, "ascend-grouped-w4a8 W4A8->W4A8": 4}),
]


@pytest.mark.parametrize(("name", "quantize", "scheme", "expected"), CASES, ids=[f"{c[0]}-{c[2]}" for c in CASES])
def test_a_model_quantized_on_load_agrees_with_the_cpu(
    name: str, quantize: Callable[[], TransloadConfig], scheme: str, expected: dict[str, int], tmp_path: Path
) -> None:
    make(name, tmp_path)
    error, kernels = _compare(tmp_path, quantize(), scheme)
    assert kernels == expected
    assert error < TOLERANCE[scheme]


@pytest.mark.parametrize("name", ["qwen3-moe", "glm4-moe"])
def test_a_checkpoint_ported_for_vllm_ascend_runs_its_experts_in_w4a8(name: str, tmp_path: Path) -> None:
    make(name, tmp_path / "float")
    quantized = transload.load(tmp_path / "float", device="cpu", quantize=_channels())
    quantized.save_pretrained(tmp_path / "quantized")
    transload.port(tmp_path / "quantized", tmp_path / "ascend", to="msmodelslim", activations="int8")
    error, kernels = _compare(tmp_path / "ascend", None, None)
    assert error < TOLERANCE["w4a8"]
    if NPU.simulated:
        assert _fused_calls() > 0
    assert kernels["ascend-grouped-w4a8 W4A8->W4A8"] > 0


def _fused_calls() -> int:
    """Calls of the fused gate-up operator, which the simulator counts."""
    from simulator.meta import CALLS

    return CALLS["npu_grouped_matmul_swiglu_quant_v2"]
