"""GGUF files of every architecture against transformers' names and the gguf package's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_model import CASES, Case, build

import transload
from transload.checkpoint import Checkpoint
from transload.errors import FormatError, Unsupported
from transload.models.gguf_llama3 import llama3_scaling
from transload.quant import QTensor

BY_ARCH = {case.arch: case for case in CASES}


def values(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Everything in a checkpoint as float32, experts one by one under their names on disk."""
    found: dict[str, torch.Tensor] = {}
    for name, entry in checkpoint.entries.items():
        value = checkpoint[name]
        t = value.dequantize() if isinstance(value, QTensor) else value
        assert tuple(t.shape) == entry.shape
        full = name if entry.spec is None else f"{name}.weight"
        head, dot, tail = full.rpartition(".experts.")
        found |= {f"{head}.experts.{e}.{tail}": t[e] for e in range(len(t))} if dot else {full: t}
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.arch)
def test_every_tensor_has_its_hugging_face_name_and_its_exact_numbers(case: Case, tmp_path: Path) -> None:
    _, meant = build(case, tmp_path / "m.gguf")
    found = values(transload.open(tmp_path / "m.gguf"))
    assert found.keys() == meant.keys()
    for name, t in meant.items():
        assert torch.equal(found[name], t), name


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.arch)
def test_the_config_means_what_transformers_config_means(case: Case, tmp_path: Path) -> None:
    from transformers import AutoConfig

    meant, _ = build(case, tmp_path / "m.gguf")
    found = transload.open(tmp_path / "m.gguf").config
    config = AutoConfig.for_model(**found)
    assert type(config) is type(meant)
    assert found["architectures"]
    differing = {
        key: (getattr(config, key, None), value)
        for key, value in meant.to_dict().items()
        if getattr(config, key, None) != value and key not in IGNORED
    }
    assert not differing


# Token ids of the tiny tokenizer; names of classes; a switch that changes nothing without a router loss.
IGNORED = {"bos_token_id", "eos_token_id", "pad_token_id", "architectures", "dtype", "transformers_version"}


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_transformers_reads_the_same_weights_from_the_same_file(arch: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    build(BY_ARCH[arch], tmp_path / "m.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    found = values(transload.open(tmp_path / "m.gguf"))
    for name, t in model.state_dict().items():
        assert torch.equal(found[name], t), name


def test_a_missing_head_means_tied_embeddings(tmp_path: Path) -> None:
    build(BY_ARCH["qwen2"], tmp_path / "m.gguf", tied=True)
    checkpoint = transload.open(tmp_path / "m.gguf")
    assert checkpoint.config["tie_word_embeddings"] is True
    assert "lm_head" not in checkpoint


def test_expert_stacks_are_one_entry_each(tmp_path: Path) -> None:
    build(BY_ARCH["qwen3moe"], tmp_path / "m.gguf")
    checkpoint = transload.open(tmp_path / "m.gguf")
    assert checkpoint.entry("model.layers.0.mlp.experts.up_proj").shape == (4, 32, 64)
    assert checkpoint.entry("model.layers.1.mlp.experts.down_proj").shape == (4, 64, 32)


def small(path: Path, arch: str, tensors: dict[str, Any], **keys: int) -> Path:
    """A GGUF file of a few tensors; a (type name, bytes array) pair is stored raw."""
    writer = gguf.GGUFWriter(str(path), arch)
    for key, value in keys.items():
        writer.add_uint32(f"{arch}.{key.replace('__', '.')}", value)
    for name, t in tensors.items():
        if isinstance(t, tuple):
            writer.add_tensor(name, t[1], raw_dtype=gguf.GGMLQuantizationType[t[0]])
        else:
            writer.add_tensor(name, t.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


HEADS = {
    "attention__head_count": 4, "attention__head_count_kv": 2, "block_count": 1, "embedding_length": 64,
    "context_length": 64, "vocab_size": 8, "attention__layer_norm_rms_epsilon": 1,
}  # fmt: skip


def entries(path: Path) -> dict[str, Any]:
    from transload.formats.gguf import Gguf
    from transload.source import open_source

    return Gguf().entries(open_source(path))


def read(path: Path, name: str) -> torch.Tensor:
    from transload.formats.gguf import Gguf
    from transload.source import open_source

    source, gguf_format = open_source(path), Gguf()
    entry = gguf_format.entries(source)[name]
    return gguf_format.decode(source, entry).dequantize() if entry.spec else gguf_format.read(source, entry)


def test_chatglms_fused_qkv_is_split_into_rows(tmp_path: Path) -> None:
    weight = torch.randn(128, 64)
    raw = gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    tensors = {"blk.0.attn_qkv.weight": ("Q8_0", raw), "blk.0.attn_qkv.bias": torch.arange(128.0)}
    path = small(tmp_path / "m.gguf", "chatglm", tensors, **HEADS)
    meant = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))
    prefix = "model.layers.0.self_attn."
    for member, rows in (("q", slice(0, 64)), ("k", slice(64, 96)), ("v", slice(96, 128))):
        assert torch.equal(read(path, f"{prefix}{member}_proj"), meant[rows])
        assert torch.equal(read(path, f"{prefix}{member}_proj.bias"), torch.arange(128.0)[rows])
    assert sum(e.stored_bytes for e in entries(path).values()) == raw.nbytes + 128 * 4


def test_llamas_biases_are_reordered_with_their_rows(tmp_path: Path) -> None:
    # Head of 16 rows: llama.cpp stores row 0 of the first half, row 0 of the second, row 1 of the first, ...
    path = small(tmp_path / "m.gguf", "llama", {"blk.0.attn_q.bias": torch.arange(64.0)}, **HEADS)
    found = read(path, "model.layers.0.self_attn.q_proj.bias")
    assert found[:16].tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15]


def test_a_split_kv_b_is_joined_as_floats(tmp_path: Path) -> None:
    k_b, v_b = torch.randn(4, 32, 64), torch.randn(4, 16, 32)  # [heads, rank, nope], [heads, v, rank]
    raw = gguf.quantize(k_b.numpy(), gguf.GGMLQuantizationType.Q8_0)
    tensors = {"blk.0.attn_k_b.weight": ("Q8_0", raw), "blk.0.attn_v_b.weight": v_b}
    path = small(tmp_path / "m.gguf", "deepseek2", tensors, **HEADS, attention__kv_lora_rank=32)
    found = read(path, "model.layers.0.self_attn.kv_b_proj.weight").reshape(4, 80, 32)
    keys = torch.from_numpy(gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0))
    assert torch.equal(found[:, :64], keys.transpose(1, 2))
    assert torch.equal(found[:, 64:], v_b)


def test_llama_3s_rotary_factors_become_its_rope_scaling(tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=64, rope_parameters=scaling, max_position_embeddings=131072)
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (torch.arange(0, 64, 2) / 64)
    tensors = {"rope_freqs.weight": plain / stretched, "output_norm.weight": torch.ones(64)}
    path = small(tmp_path / "m.gguf", "llama", tensors, **HEADS)
    found = llama3_scaling((plain / stretched).tolist(), 500000.0)["rope_scaling"]
    assert found == {k: v for k, v in scaling.items() if k != "rope_theta"}
    with pytest.raises(Unsupported, match=r"m\.gguf: rope_freqs\.weight stretches"):
        transload.open(path)  # its own theta is another, so the factors mean nothing that has a name


def test_rotary_factors_are_no_weights(tmp_path: Path) -> None:
    tensors = {"rope_freqs.weight": torch.ones(8), "output_norm.weight": torch.ones(64)}
    assert entries(small(tmp_path / "m.gguf", "qwen2", tensors, **HEADS)).keys() == {"model.norm.weight"}


def read_all(path: Path) -> None:
    for name in entries(path):
        read(path, name)


def blocks(kind: str, n: int = 4) -> tuple[str, np.ndarray]:
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    return kind, np.zeros((n, size), dtype=np.uint8)


@pytest.mark.parametrize(
    ("arch", "tensors", "error", "says"),
    [
        ("qwen2", {"blk.0.ffn_up.weight": blocks("IQ4_XS")}, FormatError, r"blk\.0\.ffn_up\.weight.*IQ4_XS cannot be"),
        ("qwen2", {"blk.0.ffn_up.weight": blocks("TQ2_0")}, FormatError, r"TQ2_0 cannot be decoded"),
        ("qwen2", {"blk.0.surprise.weight": torch.ones(4)}, FormatError, r"'blk\.0\.surprise\.weight' does not belong"),
        ("qwen2", {"blk.0.attn_q.bias": ("Q8_0", np.zeros(34, dtype=np.uint8))}, FormatError, "expected a matrix"),
        ("mamba", {"output_norm.weight": torch.ones(4)}, Unsupported, "'mamba': known ones are llama"),
        ("llama", {"blk.0.attn_q.bias": torch.ones(10)}, FormatError, "10 rows do not divide into 4 heads"),
        ("chatglm", {"blk.0.attn_qkv.bias": torch.ones(10)}, FormatError, "10 fused q, k, v rows"),
        ("deepseek2", {"blk.0.attn_k_b.weight": torch.ones(4, 8, 8)}, FormatError, "no .*attn_v_b"),
    ],
    ids=["unknown-type", "ternary", "unknown-name", "packed-bias", "architecture", "heads", "qkv", "half"],
)
def test_what_cannot_be_read_is_named(
    arch: str, tensors: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    path = small(tmp_path / "m.gguf", arch, tensors, **HEADS, attention__kv_lora_rank=8)
    with pytest.raises(error, match=says):
        read_all(path)


def test_a_config_without_a_needed_key_names_it(tmp_path: Path) -> None:
    keys = {k: v for k, v in HEADS.items() if k != "context_length"}
    path = small(tmp_path / "m.gguf", "qwen2", {"output_norm.weight": torch.ones(4)}, **keys)
    with pytest.raises(FormatError, match=r"m\.gguf: metadata has no qwen2\.context_length"):
        transload.open(path)
