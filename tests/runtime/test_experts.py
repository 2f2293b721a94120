"""QuantExperts against transformers' own experts, and the layouts that are refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

from transload.quant import QuantSpec
from transload.reference import quantize_rtn
from transload.runtime.experts import PROJECTIONS, QuantExperts, experts_refusal, is_experts
from transload.runtime.placement import target

E, H, I, TOP = 4, 64, 32, 2  # noqa: E741


class Experts(nn.Module):
    """Experts as transformers 5 writes them: fused weights, a declared layout, a gate of the family's own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(E, 2 * I, H) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(E, H, I) * 0.2)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.silu(gate.clamp(max=1.0)) * up.clamp(-1.0, 1.0)  # clamped, as GLM-5 and DeepSeek-V4

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for t in range(len(x)):
            for e, weight in zip(index[t].tolist(), weights[t], strict=True):
                if e < E:
                    out[t] += weight * (self.down_proj[e] @ self._apply_gate(self.gate_up_proj[e] @ x[t]))
        return out


def quantized(module: Experts, scheme: str = "w4a16") -> QuantExperts:
    """The module's stand-in; the module itself gets the dequantized weights."""
    weights = {}
    for name in PROJECTIONS:
        parameter = getattr(module, name)
        weights[name] = quantize_rtn(parameter.detach(), QuantSpec(4, 32))
        parameter.data.copy_(weights[name].dequantize())
    shell = Experts()
    stand_in = QuantExperts.replacing(shell)
    for name, w in weights.items():
        stand_in.fill(name, w, target("cpu", scheme))
    return stand_in


@pytest.mark.parametrize(
    "index",
    [
        [[0, 1], [2, 3], [1, 0]],
        [[2, 3], [3, 2], [2, 3]],  # experts without rows
        [[E, 1], [0, E], [E, E]],  # "not here", of expert parallelism
    ],
    ids=["all", "some-idle", "elsewhere"],
)
@pytest.mark.parametrize("in_a_graph", [False, True], ids=["eager", "graph"])
def test_experts_compute_what_the_model_computes(
    index: list[list[int]], in_a_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: in_a_graph)
    torch.manual_seed(0)
    module = Experts()
    stand_in = quantized(module)
    x, weights = torch.randn(3, H), torch.rand(3, TOP)
    with torch.no_grad():
        truth = module(x, torch.tensor(index), weights)
    torch.testing.assert_close(stand_in(x, torch.tensor(index), weights), truth, rtol=0, atol=2e-3)


def test_no_tokens_are_no_problem() -> None:
    out = quantized(Experts())(torch.empty(0, H), torch.empty(0, TOP, dtype=torch.int64), torch.empty(0, TOP))
    assert out.shape == (0, H)


class Shapes(QuantExperts):
    """The layer without its products, which are tested where the kernels are."""

    def _products(self, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        assert counts.shape == (E,)
        return torch.empty_like(rows)


def traced(device: str) -> torch.Size:
    """The layer on tensors that have no numbers: whoever asks for one fails."""
    layer = Shapes(E, Experts()._apply_gate)
    with FakeTensorMode():
        index = torch.empty(5, TOP, dtype=torch.int64, device=device)
        return layer(torch.empty(5, H, device=device), index, torch.empty(5, TOP, device=device)).shape


def test_on_a_device_nothing_waits_for_a_number() -> None:
    assert traced("cuda") == (5, H)
    with pytest.raises(DynamicOutputShapeException):  # in host memory numbers cost nothing, and rows are left out
        traced("cpu")


def test_the_weights_come_back_exactly() -> None:
    torch.manual_seed(0)
    module = Experts()
    w = quantize_rtn(module.gate_up_proj.detach(), QuantSpec(4, 32))
    assert quantized(module).qtensor("gate_up_proj").equal(w)


REFUSED = {
    "aria": ("AriaTextConfig", {"moe_num_experts": 4}, "transposed weights"),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 4}, "transposed weights"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_layouts_that_would_compute_something_else_are_refused(family: str) -> None:
    config_name, experts, words = REFUSED[family]
    config = getattr(transformers, config_name)(hidden_size=H, intermediate_size=I, **experts)
    name = {"aria": "AriaExperts", "gpt_oss": "GptOssExperts"}[family]
    module = getattr(__import__(f"transformers.models.{family}.modeling_{family}", fromlist=[name]), name)
    with torch.device("meta"):
        found = module(config)
    assert not is_experts(found) or words in str(experts_refusal(found))


FAMILIES = {
    "Qwen3MoeConfig": {},
    "Glm4MoeConfig": {"first_k_dense_replace": 0},
    "GlmMoeDsaConfig": {"mlp_layer_types": ["sparse"]},
    "DeepseekV3Config": {"first_k_dense_replace": 0},
    "MiniMaxM2Config": {},
    "MixtralConfig": {},
}


@pytest.mark.parametrize("config_name", FAMILIES)
def test_the_experts_of_a_family_run_quantized(config_name: str) -> None:
    if not hasattr(transformers, config_name):
        pytest.skip(f"transformers {transformers.__version__} has no {config_name}")
    config = getattr(transformers, config_name)(num_hidden_layers=1, **FAMILIES[config_name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    found = [m for m in model.modules() if is_experts(m)]
    assert len(found) == 1
    assert experts_refusal(found[0]) is None
