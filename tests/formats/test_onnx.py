"""ONNX: onnxruntime's own quantizers are read, and what is written runs in onnxruntime."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from memory_source import GOLDEN, random_weight
from onnx import TensorProto, helper, numpy_helper
from onnx_linears import save
from safetensors.torch import load_file

import transload
from transload.errors import CannotHold, FormatError, OutputExists, TransloadError
from transload.formats.onnx import Onnx
from transload.formats.onnx_source import OnnxSource
from transload.quant import ActSpec, QTensor, QuantSpec, Zero

ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
FMT = Onnx()
MODULE = "model.layers.0.self_attn.q_proj"


def model_of(nodes: list[onnx.NodeProto], initializers: list[TensorProto], k: int, n: int) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["M", n])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def float_model(weight: np.ndarray) -> onnx.ModelProto:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="/model/layers.0/attn/q_proj/MatMul")
    return model_of([node], [numpy_helper.from_array(weight.T.copy(), "w")], weight.shape[1], weight.shape[0])


def run(path: Path, x: torch.Tensor, source: str = "x", target: str = "y") -> torch.Tensor:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # Optimized, a DequantizeLinear and its MatMul become a MatMulNBits that rounds activations to int8.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run([target], {source: x.numpy()})[0])


def test_the_golden_tensors_decode_exactly_and_encode_to_the_same_bytes(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN / "ort_mnb4_asym_b32.safetensors")
    inputs = ["B_Q4", "B_scales", "B_zero_points"]
    node = helper.make_node(
        "MatMulNBits", ["x", *inputs], ["y"], MODULE, domain="com.microsoft", K=256, N=64, bits=4, block_size=32
    )
    initializers = [numpy_helper.from_array(tensors[f"ckpt.{name}"].numpy(), name) for name in inputs]
    onnx.save(model_of([node], initializers, 256, 64), tmp_path / "m.onnx")
    checkpoint = transload.open(tmp_path / "m.onnx")
    w = checkpoint[MODULE]
    assert isinstance(w, QTensor)
    assert torch.equal(w.dequantize(), tensors["dequant"])
    for part, name in (("B", "B_Q4"), ("scales", "B_scales"), ("zero_points", "B_zero_points")):
        assert torch.equal(FMT.encode("m", w)[f"m.{part}"], tensors[f"ckpt.{name}"]), part
    # The golden product is onnxruntime's too, in another order of additions.
    assert torch.allclose(tensors["in.x"] @ w.dequantize().T, tensors["y"], atol=1e-5)


@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("n", "k", "block"), [(24, 96, 32), (5, 64, 16), (8, 200, 64)])
def test_onnxruntimes_quantizer_reads_as_what_it_computes(
    tmp_path: Path, form: str, symmetric: bool, n: int, k: int, block: int
) -> None:
    pytest.importorskip("onnx_ir", reason="onnxruntime's quantizer needs onnx_ir, which is not installed")
    from onnxruntime.quantization import QuantFormat
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(k)).numpy()
    quantizer = MatMulNBitsQuantizer(
        float_model(weight), block_size=block, is_symmetric=symmetric, quant_format=QuantFormat[form]
    )
    quantizer.process()
    path = tmp_path / "q.onnx"
    quantizer.model.save_model_to_file(str(path), False)
    checkpoint = transload.open(path)
    w = checkpoint[MODULE]
    assert isinstance(w, QTensor)
    assert (w.n, w.k, w.spec.group_size) == (n, k, block)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(run(path, x), x @ w.dequantize().T, atol=1e-4)


@pytest.mark.parametrize("form", ["QOperator", "QDQ"])
@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_files_of_onnxruntimes_quantizer_read_as_what_it_computes(form: str, kind: str) -> None:
    path = GOLDEN / f"ort_{form}_{kind}_b32.onnx"
    w = transload.open(path)[MODULE]
    assert isinstance(w, QTensor)
    assert w.spec == QuantSpec(4, 32, zero=Zero.CODES if kind == "asym" else Zero.MIDPOINT)
    x = torch.randn(3, w.k, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(run(path, x), x @ w.dequantize().T, atol=1e-4)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("kind", ["INT4", "UINT4", "INT8", "UINT8"])
def test_dequantize_linear_per_output_reads(tmp_path: Path, kind: str, transposed: bool) -> None:
    n, k = 6, 40
    low, high = {"INT4": (-8, 8), "UINT4": (0, 16), "INT8": (-128, 128), "UINT8": (0, 256)}[kind]
    g = torch.Generator().manual_seed(0)
    q = torch.randint(low, high, (n, k), generator=g)
    zero, scale = torch.randint(low, high, (n,), generator=g), torch.rand(n, generator=g) + 0.1
    stored = q if transposed else q.T
    initializers = [
        helper.make_tensor("w", getattr(TensorProto, kind), stored.shape, stored.flatten().tolist()),
        helper.make_tensor("z", getattr(TensorProto, kind), [n], zero.tolist()),
        numpy_helper.from_array(scale.numpy(), "s"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["d"], axis=0 if transposed else 1),
        helper.make_node("Gemm", ["x", "d"], ["y"], name=MODULE, transB=int(transposed)),
    ]
    path = tmp_path / "q.onnx"
    onnx.save(model_of(nodes, initializers, k, n), path)
    w = transload.open(path)[MODULE]
    assert isinstance(w, QTensor)
    assert w.spec.group_size == -1
    assert torch.allclose(w.dequantize(), (q - zero[:, None]) * scale[:, None], rtol=1e-6)
    x = torch.randn(2, k)
    assert torch.allclose(run(path, x), x @ w.dequantize().T, atol=1e-3)


SPECS = [
    QuantSpec(4, 32),
    QuantSpec(4, 16, zero=Zero.CODES),
    QuantSpec(8, 64, zero=Zero.CODES),
    QuantSpec(4, 32, zero=Zero.FLOATS),
    QuantSpec(4, 32, act_order=True),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_written_runs_in_onnxruntime_and_reads_back(tmp_path: Path, spec: QuantSpec) -> None:
    weights = {"a.up_proj": random_weight(spec, 24, 96), "b": random_weight(spec, 5, 200, 1)}
    path = tmp_path / "m.onnx"
    save(path, weights.items())
    checkpoint = transload.open(path)
    for name, w in weights.items():
        found = checkpoint[name]
        assert isinstance(found, QTensor)
        assert found.equal(w)
        x = torch.randn(3, w.k).to(spec.scale_dtype)
        y = _one(path, name, x, weights)
        exact = x.float() @ w.dequantize().T
        error = float((y - exact).norm() / exact.norm())
        assert error < 1e-5, error


def _one(path: Path, name: str, x: torch.Tensor, weights: dict[str, QTensor]) -> torch.Tensor:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feed = {f"{m}.x": np.zeros((1, w.k), x.numpy().dtype) for m, w in weights.items()} | {f"{name}.x": x.numpy()}
    return torch.from_numpy(session.run([f"{name}.y"], feed)[0]).float()


def test_int8_activations_are_accuracy_level_4_and_read_back_as_what_they_are(tmp_path: Path) -> None:
    w = random_weight(QuantSpec(4, 32, act=ActSpec()), 32, 256)
    save(tmp_path / "m.onnx", [("m", w)])
    assert transload.open(tmp_path / "m.onnx").entries["m"].spec.act == ActSpec(group_size=32)
    x = torch.randn(4, 256)
    y, exact = run(tmp_path / "m.onnx", x, "m.x", "m.y"), x @ w.dequantize().T
    assert float((y - exact).norm() / exact.norm()) < 0.02  # int8 activations, block by block


def test_float_tensors_travel_along(tmp_path: Path) -> None:
    floats = {
        "model.norm.weight": torch.randn(8).bfloat16(),
        "bias": torch.arange(4.0),
        "empty": torch.ones(0, 3).half(),
    }
    w = random_weight(QuantSpec(4, 32), 4, 64)
    save(tmp_path / "m.onnx", [("h.0.attn.c_proj", w)], floats.items())
    checkpoint = transload.open(tmp_path / "m.onnx")
    assert checkpoint.modules()["h.0.attn.c_proj"] == w.spec
    for name, t in floats.items():
        found = checkpoint[name]
        assert isinstance(found, torch.Tensor)
        assert found.dtype == t.dtype
        assert torch.equal(found, t)
    x = torch.randn(2, 64)
    assert torch.allclose(
        run(tmp_path / "m.onnx", x, "h.0.attn.c_proj.x", "h.0.attn.c_proj.y"), x @ w.dequantize().T, atol=1e-4
    )


def test_refusals_leave_nothing_behind(tmp_path: Path) -> None:
    good, bad = random_weight(QuantSpec(4, 32), 4, 64), random_weight(QuantSpec(4, 48), 4, 96)
    path = tmp_path / "m.onnx"
    with pytest.raises(CannotHold, match=r"'b'.*16, 32, 64, 128 or 256"):
        save(path, [("a", good), ("b", bad)])
    assert not list(tmp_path.iterdir())
    save(path, [("a", good)])
    with pytest.raises(OutputExists, match=r"m\.onnx"):
        save(path, [("a", good)])


def written(folder: Path) -> onnx.ModelProto:
    """A small model with its data inside."""
    save(folder / "m.onnx", [(MODULE, random_weight(QuantSpec(4, 16, zero=Zero.CODES), 4, 40))], overwrite=True)
    return onnx.load(folder / "m.onnx")


def read_all(path: Path) -> None:
    source = OnnxSource(path)
    for entry in FMT.entries(source).values():
        if entry.spec is not None:
            w = FMT.decode(source, entry)
            assert (w.spec, tuple(w.codes.shape)) == (entry.spec, entry.shape)


def with_location(folder: Path, location: str, offset: int = 0) -> Path:
    save(folder / "m.onnx", [(MODULE, random_weight(QuantSpec(4, 16), 4, 40))], overwrite=True)
    model = onnx.load(folder / "m.onnx", load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = {"location": location, "offset": str(offset)}.get(entry.key, entry.value)
    (folder / "bad.onnx").write_bytes(model.SerializeToString())
    return folder / "bad.onnx"


@pytest.mark.parametrize(
    ("location", "offset", "message"),
    [
        ("../outside", 0, "no file inside"),
        ("/etc/hostname", 0, "no file inside"),
        ("", 0, "no file inside"),
        ("m.onnx.data", 10**9, "needs 96 bytes"),
        ("m.onnx.data", -4, "needs 96 bytes"),
    ],
)
def test_external_data_stays_inside_the_folder(tmp_path: Path, location: str, offset: int, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        read_all(with_location(tmp_path, location, offset))
    assert "bad.onnx" in str(caught.value)


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("K", 41, None),
        ("K", 0, "K=0"),
        ("N", 5, "expected .5, 3, 8."),
        ("bits", 3, "bits=3"),
        ("block_size", 0, "block_size=0"),
    ],
)
def test_contradictions_are_named(tmp_path: Path, attribute: str, value: int, message: str | None) -> None:
    model = written(tmp_path)
    for a in model.graph.node[0].attribute:
        if a.name == attribute:
            a.i = value
    (tmp_path / "bad.onnx").write_bytes(model.SerializeToString())
    if message is None:  # 41 inputs fill three blocks of 16 as 40 do
        read_all(tmp_path / "bad.onnx")
        return
    with pytest.raises(FormatError, match=message):
        read_all(tmp_path / "bad.onnx")


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_broken_files_never_crash(tmp_path: Path, data: st.DataObject) -> None:
    model = written(tmp_path)
    raw = bytearray(model.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 20))
    broken = copy.copy(raw)[: len(raw) - cut]
    (tmp_path / "bad.onnx").write_bytes(broken)
    try:
        read_all(tmp_path / "bad.onnx")
    except TransloadError as e:
        message = str(e)
    else:
        return
    assert "bad.onnx" in message
    assert "\n" not in message
