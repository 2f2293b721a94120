"""MatMulNBits: its layout against ONNX Runtime's own quantizer, its limits, its sessions."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from transload import bits, reference
from transload.errors import ConfigError
from transload.hal import Problem
from transload.quant import PER_CHANNEL, ActSpec, Grid, QTensor, QuantSpec, Zero
from transload.testing import CASES, coverage, nmse
from transload_cpu import onnx_kernel, onnx_probe
from transload_cpu.backend import backend
from transload_cpu.onnx_kernel import OnnxKernel
from transload_cpu.onnx_layout import block_size, lay_out

GOLDEN = Path(__file__).parents[1] / "golden"
HOST = backend.devices()[0]
GROUP_32 = ActSpec(group_size=32)


def weight(spec: QuantSpec, n: int = 24, k: int = 256) -> QTensor:
    return reference.quantize_rtn(torch.randn(n, k, generator=torch.Generator().manual_seed(1)), spec)


def inputs(m: int = 5, k: int = 256) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(2))


def test_it_takes_most_cases() -> None:
    found = coverage(backend)
    assert found["onnx"] >= 222
    assert found["reference"] == len(CASES)


def test_the_layout_is_the_one_of_onnxruntimes_quantizer() -> None:
    golden = load_file(GOLDEN / "ort_mnb4_asym_b32.safetensors")
    theirs = golden["ckpt.B_Q4"]
    codes = bits.unpack(theirs.flatten(1), 4, 256)
    zeros = bits.unpack(golden["ckpt.B_zero_points"], 4, 8)
    w = QTensor(QuantSpec(4, 32, zero=Zero.CODES), codes, golden["ckpt.B_scales"], zeros)
    layout = lay_out(w)
    assert torch.equal(layout.codes, theirs)
    assert layout.zeros is not None
    assert torch.equal(layout.zeros, golden["ckpt.B_zero_points"])
    assert torch.equal(layout.scales, golden["ckpt.B_scales"])
    assert nmse(OnnxKernel().matmul(golden["in.x"], OnnxKernel().pack(w)), golden["y"]) < 1e-12


def test_rows_of_zero_points_are_padded_to_a_byte() -> None:
    layout = lay_out(weight(QuantSpec(4, 32, zero=Zero.CODES), n=2, k=96))
    assert layout.zeros is not None
    assert layout.zeros.shape == (2, 2)


BLOCKS = [
    (256, QuantSpec(4, 32), 32),
    (256, QuantSpec(4, 48), 16),
    (1024, QuantSpec(4, 512), 256),
    (1024, QuantSpec(4, PER_CHANNEL), 256),
    (100, QuantSpec(4, PER_CHANNEL), 128),
    (256, QuantSpec(4, 8), None),
    (256, QuantSpec(4, 40), None),
    (40, QuantSpec(4, 40), 64),
    (256, QuantSpec(4, 128, act=GROUP_32), 32),
    (256, QuantSpec(4, PER_CHANNEL, act=GROUP_32), 32),
    (256, QuantSpec(4, 32, act=ActSpec(group_size=128)), None),
    (256, QuantSpec(4, 48, act=ActSpec(group_size=48)), None),
    (512, QuantSpec(4, 128, act=ActSpec()), None),
    (128, QuantSpec(4, PER_CHANNEL, act=ActSpec()), 128),
]


@pytest.mark.parametrize(("k", "spec", "block"), BLOCKS, ids=[f"K{k} {spec}" for k, spec, _ in BLOCKS])
def test_the_block_is_the_largest_that_keeps_the_groups(k: int, spec: QuantSpec, block: int | None) -> None:
    assert block_size(k, spec) == block


REFUSED = [
    (QuantSpec(4, 64, Grid.NF4, Zero.NONE), torch.float32, "integer codes, not nf4"),
    (QuantSpec(4, 40), torch.float32, "group_size 40"),
    (QuantSpec(4, 128, act=ActSpec()), torch.float32, "per block"),
    (QuantSpec(4, 128, act=ActSpec(group_size=128, static=True)), torch.float32, "static"),
    (QuantSpec(4, 32, act=GROUP_32, act_order=True), torch.float32, "act-order"),
    (QuantSpec(4, 32), torch.float64, "float64"),
]


@pytest.mark.parametrize(("spec", "dtype", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_a_refusal_names_the_limit(spec: QuantSpec, dtype: torch.dtype, words: str) -> None:
    assert words in str(OnnxKernel().refuses(Problem(16, 512, spec, dtype), HOST))


@pytest.fixture
def _probed_again() -> Iterator[None]:
    onnx_probe.no_int8.cache_clear()
    onnx_probe.missing.cache_clear()
    yield
    onnx_probe.no_int8.cache_clear()
    onnx_probe.missing.cache_clear()


@pytest.mark.usefixtures("_probed_again")
def test_a_runtime_that_silently_keeps_float_activations_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnx_probe.Session
    monkeypatch.setattr(onnx_probe, "Session", lambda layout, int8_activations: real(layout, False))
    problem = Problem(16, 512, QuantSpec(4, 32, act=GROUP_32))
    assert "does not multiply 4-bit codes in blocks of 32 with int8" in str(OnnxKernel().refuses(problem, HOST))
    assert OnnxKernel().refuses(Problem(16, 512, QuantSpec(4, 32)), HOST) is None


@pytest.mark.usefixtures("_probed_again")
def test_a_missing_runtime_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert "pip install onnxruntime" in str(OnnxKernel().refuses(Problem(16, 512, QuantSpec(4, 32)), HOST))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("act", [None, GROUP_32], ids=str)
@pytest.mark.parametrize("zero", [Zero.MIDPOINT, Zero.CODES, Zero.FLOATS, Zero.MINS], ids=lambda z: z.value)
def test_every_width_is_multiplied(bits: int, act: ActSpec | None, zero: Zero) -> None:
    kernel, w = OnnxKernel(), weight(QuantSpec(bits, 32, zero=zero, act=act), k=200)
    x = inputs(k=200)
    # int8 activations are the reference's own, so only float32 sums differ, even with mins.
    assert nmse(kernel.matmul(x, kernel.pack(w)), reference.matmul(x, w)) < 1e-9


@pytest.mark.parametrize("zero", [Zero.CODES, Zero.MINS], ids=lambda z: z.value)
def test_act_order_groups_may_have_any_size(zero: Zero) -> None:
    plain = weight(QuantSpec(4, 32, zero=zero), k=100)
    sizes = torch.tensor([3, 77, 20, 0])
    g_idx = torch.repeat_interleave(torch.arange(4), sizes)[
        torch.randperm(100, generator=torch.Generator().manual_seed(3))
    ].int()
    spec = QuantSpec(4, 32, zero=zero, act_order=True)
    w = QTensor(spec, plain.codes, plain.scales, plain.zeros, plain.mins, g_idx)
    kernel, x = OnnxKernel(), inputs(k=100)
    assert nmse(kernel.matmul(x, kernel.pack(w)), reference.matmul(x, w)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_x_is_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    kernel, w, x = OnnxKernel(), weight(QuantSpec(4, 32)), inputs().to(dtype)
    packed = kernel.pack(w)
    y = kernel.matmul(x, packed)
    assert y.dtype == dtype
    assert torch.equal(y, kernel.matmul(x.float(), packed).to(dtype))


def test_a_weight_larger_than_a_session_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, bias = weight(QuantSpec(4, 32, zero=Zero.MINS)), inputs(), torch.arange(24.0)
    whole = OnnxKernel().matmul(x, OnnxKernel().pack(w), bias)
    monkeypatch.setattr(onnx_kernel, "CODES_PER_SESSION", 7 * 256)
    assert nmse(OnnxKernel().matmul(x, OnnxKernel().pack(w), bias), whole) < 1e-12


def test_sessions_live_as_long_as_their_weight() -> None:
    kernel = OnnxKernel()
    packed = [kernel.pack(weight(QuantSpec(4, 32))) for _ in range(3)]
    for p in packed:
        kernel.matmul(inputs(), p)
    assert len(kernel._weights) == 3
    del packed, p
    gc.collect()
    assert not kernel._weights


def test_a_weight_that_is_written_to_is_built_again() -> None:
    kernel, w = OnnxKernel(), weight(QuantSpec(4, 32))
    packed = kernel.pack(w)
    kernel.matmul(inputs(), packed)
    for name, tensor in kernel.pack(reference.quantize_rtn(-w.dequantize(), w.spec)).tensors.items():
        packed.tensors[name].copy_(tensor)
    assert nmse(kernel.matmul(inputs(), packed), reference.matmul(inputs(), kernel.unpack(packed))) < 1e-11
    assert len(kernel._weights) == 1


def test_threads_may_share_a_weight() -> None:
    kernel, w = OnnxKernel(), weight(QuantSpec(4, 32, act=GROUP_32))
    packed, xs = kernel.pack(w), [inputs(m) for m in (1, 2, 3, 4)]
    truth = [reference.matmul(x, w) for x in xs]
    start, errors = threading.Barrier(4), []

    def work(i: int) -> None:
        start.wait()
        errors.extend(nmse(kernel.matmul(xs[i], packed), truth[i]) for _ in range(20))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(errors) == 80
    assert max(errors) < 1e-9
    assert len(kernel._weights) == 1


BAD_X = [torch.zeros(2, 255), torch.zeros(256), torch.zeros(1, 2, 256), torch.zeros(2, 256, device="meta")]


@pytest.mark.parametrize("x", BAD_X, ids=lambda x: f"{tuple(x.shape)} {x.device}")
def test_x_of_another_shape_or_place_is_refused(x: torch.Tensor) -> None:
    kernel = OnnxKernel()
    with pytest.raises(ConfigError, match=r"expected \[M, 256\] on the CPU"):
        kernel.matmul(x, kernel.pack(weight(QuantSpec(4, 32))))


def test_counts_must_sum_to_the_rows() -> None:
    kernel = OnnxKernel()
    w = reference.quantize_rtn(torch.randn(2, 24, 64), QuantSpec(4, 32))
    with pytest.raises(ConfigError, match="counts"):
        kernel.grouped_matmul(inputs(5, 64), kernel.pack(w), torch.tensor([2, 2]))


def _in_a_process(code: str, threads: int) -> str:
    code = f"import torch; torch.set_num_threads({threads})\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


MULTIPLY = """
from transload import reference
from transload.quant import QuantSpec
from transload_cpu.onnx_kernel import OnnxKernel
kernel = OnnxKernel()
w = kernel.pack(reference.quantize_rtn(torch.ones(64, 64), QuantSpec(4, 32)))
"""
COUNT = "__import__('os').listdir('/proc/self/task').__len__()"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_a_session_has_as_many_threads_as_torch(threads: int) -> None:
    code = f"""{MULTIPLY}
import onnxruntime
before = {COUNT}
kernel.matmul(torch.ones(1, 64), w)
print({COUNT} - before)
"""
    assert int(_in_a_process(code, threads)) == threads - 1


APPLICATION = """
import onnxruntime
from onnx import helper
x, y = (helper.make_tensor_value_info(name, 1, [1]) for name in "xy")
graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [x], [y])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
"""


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_an_application_keeps_its_own_sessions(first: str) -> None:
    ours = MULTIPLY + "print(kernel.matmul(torch.ones(1, 64), w).shape)\n"
    code = ours + APPLICATION if first == "ours" else APPLICATION + ours
    assert _in_a_process(code, 2) == "torch.Size([1, 64])"


def test_a_pool_that_the_application_made_before_is_used() -> None:
    code = f"import onnxruntime; onnxruntime.set_global_thread_pool_sizes(1, 1)\n{MULTIPLY}"
    assert _in_a_process(code + "print(kernel.matmul(torch.ones(1, 64), w).shape)", 2) == "torch.Size([1, 64])"


def test_importing_the_backend_does_not_import_onnxruntime() -> None:
    code = "import sys, transload_cpu; transload_cpu.backend.devices(); print('onnxruntime' in sys.modules)"
    assert _in_a_process(code, 1) == "False"
