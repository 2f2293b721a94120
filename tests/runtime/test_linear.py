"""QuantLinear and PackedWeight: numbers, buffers, and what must not change them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from transload import reference
from transload.errors import ConfigError, FormatError
from transload.quant import PER_CHANNEL, ActSpec, QuantSpec, Zero
from transload.reference import quantize_rtn
from transload.runtime import QuantLinear
from transload.runtime.placement import place, target

SPECS = {
    "int4-g32": QuantSpec(4, 32),
    "int4-g32-asym": QuantSpec(4, 32, zero=Zero.CODES, scale_dtype=torch.float16),
    "int4-g32-mins": QuantSpec(4, 32, zero=Zero.MINS),
    "int8-channel": QuantSpec(8, PER_CHANNEL),
    "int5-g16": QuantSpec(5, 16),
}


def weight(spec: QuantSpec, n: int = 24, k: int = 64):
    torch.manual_seed(0)
    return quantize_rtn(torch.randn(n, k), spec)


@pytest.mark.parametrize("name", SPECS)
def test_a_layer_multiplies_with_the_dequantized_weight_and_adds_the_bias(name: str) -> None:
    w, bias, x = weight(SPECS[name]), torch.randn(24), torch.randn(2, 3, 64)
    y = QuantLinear.from_qtensor(w, bias, device="cpu")(x)
    # Kernels may carry 16-bit activations as 15-bit integers: about 5e-5 of the output.
    torch.testing.assert_close(y, x @ w.dequantize().T + bias, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", SPECS)
def test_the_weight_comes_back_exactly(name: str) -> None:
    w = weight(SPECS[name])
    assert QuantLinear.from_qtensor(w, device="cpu", scheme="w4a8").qtensor().equal(w)


def test_w4a8_quantizes_activations_per_weight_group() -> None:
    w, x = weight(SPECS["int4-g32"]), torch.randn(5, 64)
    layer = QuantLinear.from_qtensor(w, device="cpu", scheme="w4a8")
    truth = reference.matmul(x, w.with_act(ActSpec(group_size=32)))
    torch.testing.assert_close(layer(x), truth, rtol=1e-4, atol=1e-4)
    assert (layer.packed.requested, layer.packed.executed) == ("W4A8", "W4A8")


def test_stored_activations_are_saved_even_if_others_run() -> None:
    w = weight(SPECS["int4-g32"]).with_act(ActSpec())
    assert QuantLinear.from_qtensor(w, device="cpu", scheme="w4a16").qtensor().equal(w)


def test_no_rows_give_no_rows() -> None:
    assert QuantLinear.from_qtensor(weight(SPECS["int4-g32"]), device="cpu")(torch.empty(0, 64)).shape == (0, 24)


def test_half_and_double_leave_the_packed_numbers_alone() -> None:
    w = weight(SPECS["int4-g32"])
    layer = QuantLinear.from_qtensor(w, torch.randn(24), device="cpu")
    assert layer.half().double().qtensor().equal(w)


def test_bfloat16_activations_give_bfloat16() -> None:
    w, x = weight(SPECS["int4-g32"]), torch.randn(4, 64, dtype=torch.bfloat16)
    y = QuantLinear.from_qtensor(w, device="cpu", x_dtype=torch.bfloat16)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), x.float() @ w.dequantize().T, rtol=2e-2, atol=5e-2)


def test_the_state_dict_holds_the_weight() -> None:
    one, other = (
        QuantLinear.from_qtensor(quantize_rtn(torch.randn(24, 64), SPECS["int4-g32"]), device="cpu") for _ in "ab"
    )
    x = torch.randn(3, 64)
    before = other(x)
    other.load_state_dict(one.state_dict(), assign=True)
    assert torch.equal(other(x), one(x))
    assert not torch.equal(other(x), before)


def test_a_deep_copy_works_on_its_own() -> None:
    layer = QuantLinear.from_qtensor(weight(SPECS["int4-g32"]), device="cpu")
    x = torch.randn(3, 64)
    y = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), y)


def test_model_code_that_reads_the_weight_gets_its_values() -> None:
    w = weight(SPECS["int4-g32"])
    layer = QuantLinear.from_qtensor(w, device="cpu")
    assert torch.equal(layer.weight, w.dequantize())
    assert not any(name == "weight" for name, _ in layer.named_parameters())


def test_the_printed_layer_says_scheme_kernel_and_precision() -> None:
    layer = QuantLinear.from_qtensor(weight(SPECS["int4-g32"]), device="cpu", scheme="w4a8")
    shown = repr(nn.Sequential(layer))
    assert f"kernel={layer.packed.kernel.name}, runs=W4A8" in shown
    assert "int4 g32 sym" in shown


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(FormatError, match=r"the weight is \(24, 64\), expected \(8, 64\)"):
        QuantLinear(64, 8).fill("weight", weight(SPECS["int4-g32"]), target("cpu"))


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ConfigError, match="scheme 'w3a3': there are w4a16, w4a8"):
        target("cpu", "w3a3")


class OnlyFloatActivations:
    """A backend that refuses int8 activations and everything but float32."""

    name = "picky"

    def __init__(self, kernel):
        self.kernels = (kernel,)


def test_a_step_away_from_the_request_is_noted() -> None:
    plain = target("cpu", "w4a8", torch.bfloat16)
    choice = place(weight(SPECS["int4-g32"]), plain).choice

    class Picky(type(choice.kernel)):
        def refuses(self, p, device):
            if p.spec.act is not None:
                return "no int8 units"
            return None if p.x_dtype == torch.float32 else "float32 only"

    picky = copy.copy(plain)
    object.__setattr__(picky, "backend", OnlyFloatActivations(Picky()))
    placed = place(weight(SPECS["int4-g32"]), picky)
    assert (placed.requested, placed.weight.spec.act, placed.x_dtype) == ("W4A8", None, torch.float32)
    assert placed.notes[0].startswith("asked for int8 dynamic per token and 32, runs with float activations: no kernel")
    assert placed.notes[1] == "torch.bfloat16 activations are cast to torch.float32 for the kernel"
