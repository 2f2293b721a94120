"""The hardware layer: how a kernel is chosen, how a backend and a device are found, what a kernel has by default."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from transload import hal
from transload.errors import NoBackend, NoKernel, Unsupported
from transload.hal import Backend, BrokenBackend, Device, Kernel, Packed, Problem, Serving
from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec, stack_experts

SPEC = QuantSpec(4, 48)


class Picky(Kernel):
    """Refuses with a fixed sentence, or not at all."""

    def __init__(self, name: str, reason: str | None) -> None:
        self.label, self.reason = name, reason

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.label

    def refuses(self, p: Problem, device: Device) -> str | None:
        return self.reason

    def pack(self, w: QTensor) -> Packed:
        return Packed(self.name, w.spec, w.n, w.k, {"codes": w.codes, "scales": w.scales})

    def unpack(self, p: Packed) -> QTensor:
        return QTensor(p.spec, p.tensors["codes"], p.tensors["scales"])

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class Vendor:
    """A backend with a number of devices, or a reason for having none."""

    serving: ClassVar[Serving] = Serving()

    def __init__(self, name: str, devices: int = 1, missing: str | None = None, kernels: Sequence[Kernel] = ()) -> None:
        self.name, self.count, self.missing, self.kernels = name, devices, missing, kernels

    def unavailable(self) -> str | None:
        return self.missing

    def devices(self) -> Sequence[Device]:
        return () if self.missing else tuple(device(self.name, i) for i in range(self.count))

    def torch_device(self, device: Device) -> torch.device:
        return torch.device("cpu")


def device(backend: str = "acme", index: int = 0) -> Device:
    return Device(backend, index, "One", "a1", 8, 8)


def weight(n: int = 3, k: int = 96) -> QTensor:
    return QTensor(SPEC, torch.zeros(n, k, dtype=torch.uint8), torch.ones(n, 2))


def test_the_first_kernel_that_does_not_refuse_is_chosen() -> None:
    kernels = Picky("fast", "group_size 48 is odd"), Picky("good", None), Picky("slow", None)
    choice = hal.choose(Vendor("acme", kernels=kernels), Problem.of(weight()), device())
    assert choice.kernel is kernels[1]
    assert choice.passed_over == (("fast", "group_size 48 is odd"),)


def test_when_every_kernel_refuses_every_reason_is_in_the_error() -> None:
    kernels = Picky("fast", "group_size 48 is odd"), Picky("slow", "it is Sunday")
    with pytest.raises(NoKernel) as error:
        hal.choose(Vendor("acme", kernels=kernels), Problem.of(weight()), device())
    text = str(error.value)
    assert "'acme'" in text
    assert "W4A16 int4 g48 sym" in text
    assert "[N=3, K=96]" in text
    assert "fast: group_size 48 is odd; slow: it is Sunday" in text


def test_a_backend_without_kernels_says_so() -> None:
    with pytest.raises(NoKernel, match="it has no kernels"):
        hal.choose(Vendor("acme"), Problem.of(weight()), device())


def test_a_problem_is_what_a_weight_poses() -> None:
    w = weight().with_act(ActSpec())
    assert Problem.of(w, torch.bfloat16, m=7) == Problem(3, 96, w.spec, torch.bfloat16, 7)
    assert Problem.of(stack_experts([w, w])).experts == 2
    assert "2 experts" in str(Problem.of(stack_experts([w, w])))


def test_optional_parts_of_a_kernel_are_unsupported_by_default() -> None:
    kernel, w = Picky("plain", None), weight()
    packed = kernel.pack(w)
    with pytest.raises(Unsupported, match="plain"):
        kernel.grouped_matmul(torch.zeros(1, 96), packed, torch.ones(1))
    with pytest.raises(Unsupported, match="plain"):
        kernel.rows(packed, torch.zeros(1, dtype=torch.int64))
    assert kernel.executed(Problem.of(w)) == "W4A16"
    assert kernel.executed(Problem(1, 1, QuantSpec(8, PER_CHANNEL, act=ActSpec()))) == "W8A8"


def test_placing_moves_every_tensor_and_keeps_those_already_there() -> None:
    kernel = Picky("plain", None)
    packed = kernel.pack(weight())
    there = kernel.place(packed, torch.device("meta"))
    assert {t.device.type for t in there.tensors.values()} == {"meta"}
    assert kernel.place(packed, torch.device("cpu")).tensors["codes"] is packed.tensors["codes"]
    assert packed.nbytes == 3 * 96 + 3 * 2 * 4


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Backend]:
    """The backends that this test pretends are installed."""
    found: dict[str, Backend] = {}
    monkeypatch.setattr(hal, "backends", lambda: found)
    return found


def test_auto_prefers_an_accelerator_and_falls_back_to_the_cpu(installed: dict[str, Backend]) -> None:
    installed.update(cpu=Vendor("cpu"), acme=Vendor("acme", 2))
    assert hal.find_device()[0].name == "acme"
    installed["acme"] = Vendor("acme", missing="no driver")
    assert hal.find_device()[0].name == "cpu"


def test_a_device_is_found_by_backend_and_number(installed: dict[str, Backend]) -> None:
    installed.update(cpu=Vendor("cpu"), acme=Vendor("acme", 2), ascend=Vendor("ascend", 3))
    assert hal.find_device("acme:1")[1].index == 1
    assert hal.find_device("acme")[1].index == 0
    assert hal.find_device("npu:2")[1] == device("ascend", 2)


NOT_FOUND = [
    ("tpu", "no backend 'tpu' is installed; there are acme, cpu"),
    ("acme", "acme: no driver"),
    ("cpu:1", "cpu: it has 1 devices"),
    ("cpu:x", "'x' is not a device number"),
    ("cpu:-1", "'-1' is not a device number"),
]


@pytest.mark.parametrize(("name", "words"), NOT_FOUND, ids=[name for name, _ in NOT_FOUND])
def test_a_device_that_is_not_there_is_an_error_with_the_reason(
    installed: dict[str, Backend], name: str, words: str
) -> None:
    installed.update(cpu=Vendor("cpu"), acme=Vendor("acme", missing="no driver"))
    with pytest.raises(NoBackend) as error:
        hal.find_device(name)
    assert words in str(error.value)


@pytest.mark.parametrize("target", ["nowhere_at_all:backend", "transload.hal:nothing", "transload.hal:ENTRY_POINTS"])
def test_a_broken_package_says_so_and_leaves_the_others_alone(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint("broken", target, hal.ENTRY_POINTS),
        EntryPoint("cpu", "transload_cpu:backend", hal.ENTRY_POINTS),
    ]
    monkeypatch.setattr(hal, "entry_points", lambda group: points)
    hal.backends.cache_clear()
    try:
        found = hal.backends()
        assert isinstance(found["broken"], BrokenBackend)
        assert target in str(found["broken"].unavailable())
        assert hal.find_device()[0].name == "cpu"
        with pytest.raises(NoBackend, match="broken"):
            hal.find_device("broken")
    finally:
        hal.backends.cache_clear()


def test_our_own_backends_are_installed_and_load() -> None:
    found = hal.backends()
    assert {"cpu", "cuda", "ascend"} <= set(found)
    assert not [name for name, backend in found.items() if isinstance(backend, BrokenBackend)]
    assert all(isinstance(found[name], Backend) and found[name].name == name for name in ("cpu", "cuda", "ascend"))
    assert found["cpu"].unavailable() is None
