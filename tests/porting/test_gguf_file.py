"""Ports into a GGUF file: the owner's bytes come back, and the owner's libraries read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf_model import CASES, Case, build
from memory_source import MemorySource, random_weight, written

import transload
from transload.errors import CannotHold, ConfigError, OutputExists, TransloadError, Unsupported
from transload.formats import find_format
from transload.headers import read_gguf_header
from transload.models.gguf_places import WRITTEN
from transload.quant import QTensor, QuantSpec, Zero

WRITTEN_CASES = [case for case in CASES if case.model_type in WRITTEN]
QWEN = next(case for case in CASES if case.arch == "qwen2")
MOE = next(case for case in CASES if case.arch == "qwen3moe")
LLAMA = next(case for case in CASES if case.arch == "llama")


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    data = path.read_bytes()
    found = read_gguf_header(path).tensors
    return {name: (i.dtype, i.shape, data[i.start : i.end]) for name, i in found.items()}


def folder(tmp_path: Path, case: Case = QWEN, to: str = "transload") -> Path:
    """A checkpoint folder with a tokenizer, made from a tiny GGUF file, which stays beside it as a.gguf."""
    build(case, tmp_path / "a.gguf")
    transload.port(tmp_path / "a.gguf", tmp_path / "hf", to)
    return tmp_path / "hf"


@pytest.mark.parametrize("case", WRITTEN_CASES, ids=lambda c: c.arch)
def test_a_folder_becomes_the_file_that_it_was_made_from(case: Case, tmp_path: Path) -> None:
    report = transload.port(folder(tmp_path, case), tmp_path / "b.gguf", "llama.cpp")
    assert report.exact
    assert tensors(tmp_path / "b.gguf") == tensors(tmp_path / "a.gguf")
    old, new = (read_gguf_header(tmp_path / name).metadata for name in ("a.gguf", "b.gguf"))
    inferred = {"general.name", "general.type", "general.file_type", "general.quantization_version"}
    lost = {key for key in old if key not in new} - {f"{case.arch}.expert_gating_func", "tokenizer.ggml.add_bos_token"}
    assert not lost
    assert {key: new[key] for key in old if key in new and key not in inferred} == {
        key: old[key] for key in old if key in new and key not in inferred
    }
    (engine,) = [a for a in report.engines if a.engine.startswith("llama.cpp")]
    assert engine.command == f"llama-server -m {tmp_path / 'b.gguf'}"


def test_the_owners_library_reads_the_file(tmp_path: Path) -> None:
    transload.port(folder(tmp_path), tmp_path / "b.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    ours = transload.open(tmp_path / "hf")
    found = {t.name: t for t in reader.tensors}
    w = ours["model.layers.0.mlp.up_proj"]
    assert isinstance(w, QTensor)
    stored = found["blk.0.ffn_up.weight"]
    assert torch.equal(torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type)), w.dequantize())
    assert reader.get_field("general.architecture").contents() == "qwen2"
    assert reader.get_field("general.alignment") is None
    assert all(t.data_offset % 32 == 0 for t in reader.tensors)


def test_transformers_reads_the_same_model_from_the_file(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folder(tmp_path, to="fp32")
    transload.port(source, tmp_path / "b.gguf", "gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="b.gguf", dtype=torch.float32).state_dict()
    meant = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    assert theirs.keys() == meant.keys()
    assert all(torch.equal(theirs[name], meant[name]) for name in meant)
    texts = ["def f(x): return x", "你好 <|im_start|>user\n12 345"]
    tokenizers = [AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(tmp_path, gguf_file="b.gguf")]
    ids = [[t(text)["input_ids"] for text in texts] for t in tokenizers]
    assert ids[0] == ids[1]


# What a module of a folder becomes: ggml's type, and whether every number stays.
BECOMES = [
    (QuantSpec(4, 32, scale_dtype=torch.float16), "Q4_0"),
    (QuantSpec(4, 64, scale_dtype=torch.float16), "Q4_0"),
    (QuantSpec(4, -1, scale_dtype=torch.float16), "Q4_0"),
    (QuantSpec(3, 32, scale_dtype=torch.float16), "Q4_0"),
    (QuantSpec(4, 32, zero=Zero.MINS, scale_dtype=torch.float16), "Q4_1"),
    (QuantSpec(4, 64, zero=Zero.CODES, scale_dtype=torch.float16), "Q5_0"),
    (QuantSpec(8, -1, scale_dtype=torch.float16), "Q8_0"),
]


def model(folder: Path, weights: dict[str, QTensor], **floats: torch.Tensor) -> Path:
    """A folder in the library's own format that has nothing but these weights and a tokenizer's first token."""
    source = written(find_format("transload"), weights)
    source.config |= {
        "model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8,
        "num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    tokenizer = {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
        "added_tokens": [{"id": 3, "content": "<|end|>", "special": True}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    }
    table = {"model.embed_tokens.weight": torch.randn(8, 64, dtype=torch.bfloat16)}
    files = source.files | {"tokenizer.json": tokenizer, "tokenizer_config.json": {"eos_token": "<|end|>"}}
    tensors = source.tensors | table | {name.replace("__", "."): t for name, t in floats.items()}
    return MemorySource(tensors, source.config, files).save(folder)


@pytest.mark.parametrize(("spec", "kind"), BECOMES, ids=lambda v: str(v).replace(" ", "-"))
def test_schemes_become_blocks_without_changing_a_number(spec: QuantSpec, kind: str, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj"
    w = random_weight(spec, 16, 64)
    report = transload.port(model(tmp_path / "a", {name: w}), tmp_path / "b.gguf", "gguf")
    assert report.exact
    assert read_gguf_header(tmp_path / "b.gguf").tensors["blk.0.ffn_up.weight"].dtype == kind
    found = transload.open(tmp_path / "b.gguf")[name]
    assert isinstance(found, QTensor)
    assert torch.equal(found.dequantize(), w.dequantize())


def test_floats_keep_their_dtype_and_norms_become_single(tmp_path: Path) -> None:
    norm = torch.randn(64, dtype=torch.bfloat16)
    half = torch.randn(16, 64, dtype=torch.float16)
    floats = {"model__norm__weight": norm, "model__layers__0__mlp__down_proj__weight": half}
    source = model(tmp_path / "a", {}, **floats)
    transload.port(source, tmp_path / "b.gguf", "gguf")
    stored = read_gguf_header(tmp_path / "b.gguf").tensors
    kinds = {name: stored[name].dtype for name in ("token_embd.weight", "output_norm.weight", "blk.0.ffn_down.weight")}
    assert kinds == {"token_embd.weight": "BF16", "output_norm.weight": "F32", "blk.0.ffn_down.weight": "F16"}
    found = transload.open(tmp_path / "b.gguf")["model.norm.weight"]
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, norm.float())


def test_the_vocabulary_is_as_long_as_the_table(tmp_path: Path) -> None:
    transload.port(model(tmp_path / "a", {}), tmp_path / "b.gguf", "gguf")
    metadata = read_gguf_header(tmp_path / "b.gguf").metadata
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b", "ab", "<|end|>", "[PAD4]", "[PAD5]", "[PAD6]", "[PAD7]"]
    assert metadata["tokenizer.ggml.token_type"] == [1, 1, 1, 3, 5, 5, 5, 5]
    assert metadata["tokenizer.ggml.merges"] == ["a b"]
    assert (metadata["tokenizer.ggml.pre"], metadata["tokenizer.ggml.eos_token_id"]) == ("gpt-2", 3)


def test_the_metadata_of_a_gguf_source_stays(tmp_path: Path) -> None:
    build(LLAMA, tmp_path / "a.gguf")
    transload.port(tmp_path / "a.gguf", tmp_path / "b.gguf", "gguf", requantize="int8-g32", requantize_all=True)
    old, new = (read_gguf_header(tmp_path / name).metadata for name in ("a.gguf", "b.gguf"))
    assert {key: new[key] for key in old} == dict(old)
    assert new["general.file_type"] == 7
    kinds = {dtype for dtype, shape, _ in tensors(tmp_path / "b.gguf").values() if len(shape) == 2}
    assert "Q8_0" in kinds


REFUSED: list[tuple[dict[str, Any], type[TransloadError], str]] = [
    ({"model_type": "gpt_neox"}, Unsupported, "no GGUF is written for model_type 'gpt_neox'"),
    ({"hidden_act": "gelu"}, Unsupported, "hidden_act is 'gelu'"),
    ({"num_hidden_layers": None}, ConfigError, "num_hidden_layers"),
]


@pytest.mark.parametrize(("fields", "error", "says"), REFUSED, ids=[r[2][:20] for r in REFUSED])
def test_models_that_the_file_cannot_describe_are_refused(
    fields: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    source = model(tmp_path / "a", {})
    config = json.loads((source / "config.json").read_text()) | fields
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=says):
        transload.port(source, tmp_path / "b.gguf", "gguf")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_tensors_without_a_place_are_listed(tmp_path: Path) -> None:
    source = model(tmp_path / "a", {}, model__layers__0__self_attn__sinks__weight=torch.ones(4))
    with pytest.raises(CannotHold, match=r"'qwen2' has no place for 1 of 2 tensors: model.layers.0.self_attn.sinks"):
        transload.port(source, tmp_path / "b.gguf", "gguf")


def test_experts_of_one_stack_must_have_one_type(tmp_path: Path) -> None:
    names = [f"model.layers.0.mlp.experts.{e}.up_proj" for e in range(2)]
    specs = [QuantSpec(bits, 32, scale_dtype=torch.float16) for bits in (4, 8)]
    weights = {name: random_weight(spec, 16, 64) for name, spec in zip(names, specs, strict=True)}
    source = model(tmp_path / "a", weights)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "qwen3_moe", "norm_topk_prob": True}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CannotHold, match=r"one tensor blk.0.ffn_up_exps.weight, and here they differ: Q4_0 .*, Q8_0"):
        transload.port(source, tmp_path / "b.gguf", "gguf")


def test_a_tokenizer_that_has_no_name_in_gguf_is_refused(tmp_path: Path) -> None:
    source = model(tmp_path / "a", {})
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps(tokenizer | {"pre_tokenizer": {"type": "Whitespace"}}))
    with pytest.raises(Unsupported, match=r"cuts text by .*Whitespace.*known are gpt-2, smollm, qwen2"):
        transload.port(source, tmp_path / "b.gguf", "gguf")
    (source / "tokenizer.json").unlink()
    with pytest.raises(TransloadError, match=r"no tokenizer\.json"):
        transload.port(source, tmp_path / "b.gguf", "gguf")


def test_a_name_without_gguf_is_corrected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"writes one file; call it b.gguf"):
        transload.port(model(tmp_path / "a", {}), tmp_path / "b", "gguf")


def test_only_a_gguf_file_is_overwritten_and_only_when_asked(tmp_path: Path) -> None:
    source = model(tmp_path / "a", {})
    target = tmp_path / "b.gguf"
    transload.port(source, target, "gguf")
    before = target.read_bytes()
    with pytest.raises(OutputExists):
        transload.port(source, target, "gguf")
    transload.port(source, target, "gguf", overwrite=True)
    assert target.read_bytes() == before
    target.unlink()
    target.mkdir()
    with pytest.raises(OutputExists, match="no GGUF file"):
        transload.port(source, target, "gguf", overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b.gguf"]


class Killed(Exception):
    pass


def test_a_killed_port_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    source = folder(tmp_path, MOE)
    transload.port(source, tmp_path / "whole.gguf", "gguf")
    target = tmp_path / "b.gguf"

    def kill(done: int, total: int, what: str) -> None:
        if "layers.1.mlp.experts.2" in what:
            raise Killed

    with pytest.raises(Killed):
        transload.port(source, target, "gguf", resume=True, progress=kill)
    assert not target.exists()
    assert (tmp_path / "b.gguf.partial" / "b.gguf").is_file()
    transload.port(source, target, "gguf", resume=True)
    assert target.read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert not (tmp_path / "b.gguf.partial").exists()
