"""humming-kernels without a GPU: its packing against its own source; all around its product, on a stand-in."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from transload import bits
from transload.errors import BackendError, ConfigError
from transload.hal import Device, Problem, choose
from transload.quant import PER_CHANNEL, ActSpec, Grid, QuantSpec, Zero
from transload.testing import Case, nmse
from transload_cuda import humming_kernel
from transload_cuda.backend import backend
from transload_cuda.humming_kernel import OPT_IN, HummingKernel

H200 = Device("cuda", 0, "NVIDIA H200", "sm_90", 141 << 30, 140 << 30)
BF16, CPU = torch.bfloat16, torch.device("cpu")
SYM = QuantSpec(4, 64, scale_dtype=BF16)
KERNEL = HummingKernel()

# What `common_pack_weight` of humming-kernels 0.1.19 (include/humming/kernel/pack_weight.cuh), compiled for the host
# with g++ 12.2, makes of the codes (7 i i + 3 i + 1) mod 2**bits, i = 0..31.
PACKED = {
    2: "7d7d7d7d 7d7d7d7d",
    3: "d9bfd2d9 d2d9bfd2 bfd2d9bf",
    4: "dffd93b1 57751b39 dffd93b1 57751b39",
    5: "ffd48d61 58ee796b cf71a9cf 69efdedc 2dee50ac",
    6: "fd2632c1 b4d9b4ff 5471d5c5 ed6536f1 b8c9f7f3 9775c504",
    7: "d928c581 d9da3dff 395e36e9 cdb1aa1e fe7ad324 32f1897b 4bdebc58",
    8: "49230b01 6d0fbf7d 71db53d9 5587c715 19131b31 bd7f4f2d 41cb6309 a5f757c5",
}


@pytest.mark.parametrize("width", PACKED)
def test_codes_are_packed_as_humming_packs_them(width: int) -> None:
    i = torch.arange(32)
    codes = ((7 * i * i + 3 * i + 1) % 2**width).to(torch.uint8).expand(64, 32).contiguous()
    weight = replace(Case(QuantSpec(width, PER_CHANNEL), n=64, k=32).operands().weight, codes=codes)
    packed = KERNEL.pack(weight)
    assert [f"{word & 0xFFFFFFFF:08x}" for word in packed.tensors["weight"][5].tolist()] == PACKED[width].split()
    assert KERNEL.unpack(packed).equal(weight)


@pytest.fixture
def humming(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """humming's four functions as its source describes them, with rows in reverse as the GPU's order. off: an error."""
    state = SimpleNamespace(off=0.0)

    def schema(b_dtype: str, weight_scale_group_size: int) -> SimpleNamespace:
        return SimpleNamespace(width=int(b_dtype.removeprefix("uint")), group=weight_scale_group_size)

    def prepare(n: int, k: int, schema: Any, torch_dtype: torch.dtype, device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(n=n, k=k, width=schema.width, group=schema.group or k, dtype=torch_dtype)

    def transform(config: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        assert tensors["weight"].shape == (config.n, config.k * config.width // 32)
        assert tensors["weight_scale"].dtype == config.dtype
        return {"weight": tensors["weight"].flip(0), "weight_scale": tensors["weight_scale"].T.contiguous()}

    def forward(config: Any, inputs: Tensor, weight: Tensor, weight_scale: Tensor, locks: Tensor) -> Tensor:
        assert locks.dtype == torch.int32
        codes = bits.unpack(weight.flip(0), config.width, config.k).float() - 2 ** (config.width - 1)
        w = codes * weight_scale.T.float().repeat_interleave(config.group, 1)
        return (inputs.float() @ w.T + state.off).to(inputs.dtype)

    for name, functions in {
        "humming": {},
        "humming.schema": {"HummingWeightSchema": schema},
        "humming.transform": {"prepare_layer_config": prepare, "transform_humming_tensors": transform},
        "humming.forward": {"humming_forward": forward},
    }.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(humming_kernel, "find_spec", lambda name: object())
    monkeypatch.setenv(OPT_IN, "1")
    humming_kernel._layer_config.cache_clear()
    yield state
    humming_kernel._layer_config.cache_clear()


CASES = [
    Case(replace(SYM, group_size=group, bits=width, scale_dtype=dtype), m=m, n=64, k=256, x_dtype=dtype, bias=bias)
    for group, width, dtype, m, bias in (
        (32, 4, BF16, 1, False), (64, 4, torch.float16, 5, True), (PER_CHANNEL, 3, BF16, 0, False),
    )
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_a_placed_weight_multiplies_and_comes_back(case: Case, humming: SimpleNamespace) -> None:
    assert KERNEL.refuses(case.problem, H200) is None
    data = case.operands()
    placed = KERNEL.place(KERNEL.pack(data.weight), CPU)
    assert KERNEL.unpack(placed).equal(data.weight)
    y = KERNEL.matmul(data.x, placed, data.bias)
    assert y.shape == (case.m, 64)
    assert (
        case.m == 0
        or nmse(y, data.x.float() @ data.weight.dequantize().T + (0 if data.bias is None else data.bias)) < 1e-4
    )


def test_a_product_that_is_off_is_not_used(humming: SimpleNamespace) -> None:
    humming.off = 1.0
    packed = KERNEL.pack(CASES[0].operands().weight)
    with pytest.raises(BackendError, match=r"\[N=64, K=256\] is off by .*; unset TRANSLOAD_HUMMING"):
        KERNEL.place(packed, CPU)


def test_it_is_the_first_choice_once_asked_for(humming: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(4096, 4096, SYM, BF16)
    assert choose(backend, problem, H200).kernel.name == "humming"
    monkeypatch.delenv(OPT_IN)
    chosen = choose(backend, problem, H200)
    assert chosen.passed_over[0] == (
        "humming", "its results are not proved on a device yet; TRANSLOAD_HUMMING=1 takes it",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spec": replace(SYM, act=ActSpec())}, "round group scales to integers"),
        ({"experts": 4}, "dense layers only"),
        ({"x_dtype": torch.float32}, "not torch.float32"),
        ({"x_dtype": torch.float16}, "would round torch.bfloat16 scales to torch.float16"),
        ({"spec": replace(SYM, bits=8)}, "would change 8-bit codes"),
        ({"spec": replace(SYM, zero=Zero.CODES)}, "not with codes"),
        ({"spec": QuantSpec(4, 64, Grid.NF4, Zero.NONE, BF16)}, "not nf4"),
        ({"spec": replace(SYM, group_size=48)}, "not 48"),
        ({"n": 72}, "[N=72, K=512]"),
        ({"k": 96}, "K=96 is not a multiple of the group of 64"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_refusals_are_sentences(change: dict[str, Any], words: str, humming: SimpleNamespace) -> None:
    assert words in str(KERNEL.refuses(replace(Problem(64, 512, SYM, BF16), **change), H200))


def test_old_gpus_and_wrong_dtypes_are_named(humming: SimpleNamespace) -> None:
    assert "8.0 or later, not sm_75" in str(KERNEL.refuses(Problem(64, 512, SYM, BF16), replace(H200, arch="sm_75")))
    packed = KERNEL.place(KERNEL.pack(CASES[0].operands().weight), CPU)
    with pytest.raises(ConfigError, match=r"x is torch\.float16, expected torch\.bfloat16"):
        KERNEL.matmul(torch.zeros(1, 256, dtype=torch.float16), packed)
