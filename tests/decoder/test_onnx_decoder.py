"""Ports into ONNX models: onnxruntime alone computes what transformers computes from the same numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers

import transload
from transload.decoder import decoder_shape
from transload.errors import CannotHold, Unsupported
from transload.runtime import TransloadConfig

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "llama": transformers.LlamaConfig(**SIZES, attention_bias=True),
    "llama-3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "qwen2-tied": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32),
    "glm": transformers.GlmConfig(**SIZES, head_dim=32, pad_token_id=0),
    "glm4": transformers.Glm4Config(**SIZES, head_dim=32, pad_token_id=0),
}
IDS = torch.randint(0, 90, (1, 12), generator=torch.Generator().manual_seed(2))


def _quantized(name: str, folder: Path) -> Path:
    """A tiny model, 4 bits in groups of 32, saved by transload."""
    torch.manual_seed(0)
    config = MODELS[name]
    config.architectures = None
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "float")
    recipe = TransloadConfig(group_size=32, symmetric=name != "qwen3", quantize_head=name == "qwen2-tied", device="cpu")
    transload.load(folder / "float", quantize=recipe, dtype=torch.float32).save_pretrained(folder / "int4")
    return folder / "int4"


def _session(folder: Path) -> onnxruntime.InferenceSession:
    """onnxruntime multiplies QDQ weights with int8 activations unless it is told not to."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return onnxruntime.InferenceSession(folder / "model.onnx", options)


def _step(session: onnxruntime.InferenceSession, ids: torch.Tensor, cache: dict[str, np.ndarray]) -> tuple:
    past = next(iter(cache.values())).shape[2] if cache else 0
    if not cache:
        layers = [i for i in session.get_inputs() if i.name.startswith("past")]
        cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in layers}
    mask = np.ones((1, past + ids.shape[1]), np.int64)
    found = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask, **cache})
    named = dict(zip([o.name for o in session.get_outputs()], found, strict=True))
    return named.pop("logits"), {name.replace("present", "past_key_values"): v for name, v in named.items()}


FORMS = [*((name, "onnx") for name in MODELS), ("llama", "onnx-qdq"), ("qwen3", "onnx-qdq"), ("qwen2-tied", "onnx-qdq")]


@pytest.fixture(scope="module", params=FORMS, ids=" ".join)
def ported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    name, to = request.param
    folder = tmp_path_factory.mktemp(name)
    int4 = _quantized(name, folder)
    report = transload.port(int4, folder / "onnx", to=to)
    assert report.exact
    return int4, folder / "onnx"


def test_onnxruntime_computes_what_transformers_does(ported: tuple[Path, Path]) -> None:
    int4, folder = ported
    model = transload.load(int4, "cpu")
    with torch.no_grad():
        meant = model(IDS).logits.numpy()
    session = _session(folder)
    whole, _ = _step(session, IDS, {})
    assert np.linalg.norm(whole - meant) / np.linalg.norm(meant) < 1e-3
    cache, pieces = {}, []
    for piece in (IDS[:, :7], IDS[:, 7:8], IDS[:, 8:]):
        logits, cache = _step(session, piece, cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), whole, atol=1e-4, err_msg="steps with the cache")


def test_the_graph_is_valid_onnx_and_reads_back_exactly(ported: tuple[Path, Path]) -> None:
    int4, folder = ported
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    operators = {n.op_type for n in graph.node}
    assert operators >= {"GroupQueryAttention", "SimplifiedLayerNormalization"}
    assert ("MatMulNBits" in operators) != ("DequantizeLinear" in operators)
    assert transload.verify(int4, folder).equal
    if "MatMulNBits" not in operators:
        return  # a quantized embedding became float, so that kernels differ
    again = transload.load(folder, "cpu")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, transload.load(int4, "cpu")(IDS).logits)


def test_generators_find_what_they_need(ported: tuple[Path, Path]) -> None:
    genai = json.loads((ported[1] / "genai_config.json").read_text())
    session = onnxruntime.InferenceSession(ported[1] / "model.onnx")
    names = {i.name for i in session.get_inputs()}
    inputs = genai["model"]["decoder"]["inputs"]
    assert {inputs["input_ids"], inputs["attention_mask"], inputs["past_key_names"] % 1} <= names
    assert genai["model"]["vocab_size"] == 96
    assert genai["model"]["decoder"]["num_hidden_layers"] == 2


def test_a_tied_head_has_no_bytes_of_its_own(tmp_path: Path) -> None:
    transload.port(_quantized("qwen2-tied", tmp_path), tmp_path / "onnx", to="onnx")
    source = transload.open(tmp_path / "onnx")
    assert source.entries["model.embed_tokens"].spec is not None
    assert "lm_head" not in source.entries
    nodes = {n.name: n for n in onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node}
    assert nodes["model.embed_tokens"].op_type == "GatherBlockQuantized"
    assert nodes["lm_head"].op_type == "MatMulNBits"


@pytest.mark.parametrize(("activations", "level"), [("16bit", 0), ("int8", 4)])
def test_activations_are_what_was_asked_for(activations: str, level: int, tmp_path: Path) -> None:
    report = transload.port(_quantized("llama", tmp_path), tmp_path / "onnx", to="onnx", activations=activations)
    nodes = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph.node
    found = {a.i for n in nodes if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"}
    assert found == {level}
    assert any(("int8" in note) == (level == 4) for note in report.notes if "activations" in note)


def test_models_that_the_graph_does_not_compute_are_refused_before_writing(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
    with pytest.raises(Unsupported, match="qwen3_moe"):
        transload.port(tmp_path / "moe", tmp_path / "onnx", to="onnx", requantize="int4-g32", requantize_all=True)
    windows = transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    with pytest.raises(Unsupported, match="sliding"):
        decoder_shape(windows.to_dict())
    longer = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(Unsupported, match="dynamic"):
        decoder_shape(transformers.LlamaConfig(**SIZES, rope_parameters=longer).to_dict())
    with pytest.raises(Unsupported, match="multiple of 16"):
        decoder_shape(transformers.LlamaConfig(**SIZES, head_dim=24).to_dict())
    assert not (tmp_path / "onnx").exists()


def test_offsets_have_no_place_in_the_graph(tmp_path: Path) -> None:
    from gguf_model import CASES, build

    build(next(case for case in CASES if case.arch == "llama"), tmp_path / "m.gguf")
    with pytest.raises(CannotHold, match="mins"):
        transload.port(tmp_path / "m.gguf", tmp_path / "onnx", to="onnx")


def test_activations_count_for_requantized_modules_too(tmp_path: Path) -> None:
    _quantized("llama", tmp_path)
    asked = {"requantize": "int4-g32", "requantize_all": True, "activations": "int8"}
    report = transload.port(tmp_path / "float", tmp_path / "onnx", to="onnx", **asked)
    assert any("int8 by token and block" in note for note in report.notes)
    specs = [e.spec for e in transload.open(tmp_path / "onnx").entries.values() if e.spec is not None]
    assert {s.act.group_size for s in specs} == {32}


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-asym", "int8-g32-asym", "int8-channel", "int4-channel"])
def test_the_standard_form_holds_every_number(scheme: str, tmp_path: Path) -> None:
    _quantized("llama", tmp_path)
    rounded = {"requantize": scheme, "requantize_all": True}
    transload.port(tmp_path / "float", tmp_path / "neutral", to="transload", **rounded)
    report = transload.port(tmp_path / "neutral", tmp_path / "onnx", to="onnx-qdq")
    assert report.exact
    assert any("int8 activations" in note for note in report.notes)
    assert transload.verify(tmp_path / "neutral", tmp_path / "onnx").equal
    whole, _ = _step(_session(tmp_path / "onnx"), IDS, {})
    with torch.no_grad():
        meant = transload.load(tmp_path / "neutral", "cpu")(IDS).logits.numpy()
    assert np.linalg.norm(whole - meant) / np.linalg.norm(meant) < 1e-3
