"""GPTQ 1 and 2 against GPTQModel's files, and its own corner cases."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hostile import broken, survives
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_source import MemorySource, decoded, golden, only, random_weight, written

import transload
from transload import bits
from transload.errors import FormatError, TransloadError
from transload.formats.gptq import Gptq, GptqV2
from transload.formats.gptq_config import BITS
from transload.quant import Grid, QTensor, QuantSpec, Zero

MODULE = "model.layers.0.mlp.up_proj"
FORMATS = (Gptq(), GptqV2())


def spec(b: int, group: int, zero: Zero = Zero.CODES, order: bool = False) -> QuantSpec:
    return QuantSpec(b, group, zero=zero, scale_dtype=torch.float16, act_order=order)


@pytest.mark.parametrize("name", ["gptq_v1_sym_g128", "gptq_v1_asym_g128"])
def test_golden_files_decode_exactly_and_encode_to_the_same_bytes(name: str) -> None:
    source, tensors = golden(name)
    entry, w = only(Gptq(), source)
    assert entry.shape == (64, 256)
    assert w.spec.zero is (Zero.CODES if "asym" in name else Zero.MIDPOINT)
    # The library multiplies in float16.
    assert torch.equal(w.dequantize(torch.float16).float(), tensors["dequant"])
    for part, t in Gptq().encode(MODULE, w).items():
        assert torch.equal(t, source.tensors[part]), part
    v2 = GptqV2().encode(MODULE, w)[f"{MODULE}.qzeros"]
    assert torch.equal(v2, tensors["ckpt_v2_qzeros"])


def test_a_zero_point_of_0_borrows_from_its_neighbour_in_version_1() -> None:
    # The words that GPTQModel 7.7 writes for these zero points: v2 0x97781670, v1 0x8667055f.
    zeros = torch.tensor([[0], [7], [6], [1], [8], [7], [7], [9]], dtype=torch.uint8)
    w = QTensor(spec(4, -1), torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 1, dtype=torch.float16), zeros)
    for fmt, word in ((Gptq(), 0x8667055F), (GptqV2(), 0x97781670)):
        source = written(fmt, {MODULE: w})
        assert int(source.tensors[f"{MODULE}.qzeros"]) & 0xFFFFFFFF == word
        assert only(fmt, source)[1].equal(w)


@pytest.mark.parametrize("b", BITS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_any_shape_group_and_zero_point_round_trips(fmt: Gptq, b: int, data: st.DataObject) -> None:
    n, k = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 150))
    group = data.draw(st.sampled_from([-1, 1, 8, 32, 100]))
    zero = data.draw(st.sampled_from([Zero.CODES, Zero.MIDPOINT]))
    order = 0 < group < k and k > 2 and data.draw(st.booleans())
    w = random_weight(spec(b, group, zero, order), n, k, k)
    if order and torch.equal(w.g_idx, torch.arange(k) // group):  # type: ignore[arg-type]
        w.g_idx[[0, -1]] = w.g_idx[[-1, 0]]  # type: ignore[index]
    assert only(fmt, written(fmt, {MODULE: w}))[1].equal(w)


def test_mixed_schemes_become_dynamic_rules_that_read_back() -> None:
    weights = {
        "model.layers.0.self_attn.q_proj": random_weight(spec(4, 32), 16, 64),
        "model.layers.1.self_attn.q_proj": random_weight(spec(4, 32), 16, 64, 1),
        "model.layers.0.mlp.down_proj": random_weight(spec(8, -1, Zero.MIDPOINT), 16, 64),
        "model.layers.1.mlp.down_proj": random_weight(spec(4, 32), 16, 64, 2),
        "lm_head": random_weight(spec(8, 32, order=True), 16, 64),
    }
    floats = {"model.layers.0.mlp.gate": (4, 64), "model.layers.1.mlp.gate": (4, 64)}
    source = written(Gptq(), weights, floats)
    found = decoded(Gptq(), source)
    assert found.keys() == weights.keys()
    assert all(found[m].equal(w) for m, w in weights.items())
    config = source.config["quantization_config"]
    assert isinstance(config, dict)
    assert config["lm_head"] is True
    rules = config["dynamic"]
    assert rules[r"-:^model\.layers\.\d+\.mlp\.gate$"] == {}
    assert not any(re.match(r[2:], "model.layers.0.mlp.gate_proj") for r in rules)


def test_fused_names_of_engines_match_the_rules() -> None:
    weights = {f"model.layers.0.mlp.{m}": random_weight(spec(4, 32), 8, 32) for m in ("gate_proj", "up_proj")}
    floats = {f"model.layers.0.self_attn.{m}": (8, 32) for m in ("q_proj", "k_proj", "v_proj")}
    config = written(Gptq(), weights, floats).config["quantization_config"]
    assert isinstance(config, dict)
    assert any(re.match(r[2:], "model.layers.0.self_attn.qkv_proj") for r in config["dynamic"])
    assert not any(re.match(r[2:], "model.layers.0.mlp.gate_up_proj") for r in config["dynamic"])


def test_a_file_without_g_idx_reads() -> None:
    w = random_weight(spec(4, 32), 8, 64)
    source = written(GptqV2(), {MODULE: w})
    tensors = {k: t for k, t in source.tensors.items() if not k.endswith("g_idx")}
    assert only(GptqV2(), MemorySource(tensors, source.config))[1].equal(w)


def test_desc_act_with_groups_in_place_is_no_act_order() -> None:
    """Static groups: the g_idx is k // group_size, so formats without one can take the weight."""
    for size in (32, -1):
        w = random_weight(spec(4, size), 8, 64)
        source = written(Gptq(), {MODULE: w})
        source.config["quantization_config"]["desc_act"] = True  # type: ignore[index]
        entry, found = only(Gptq(), source)
        assert entry.spec == w.spec
        assert found.equal(w)


def test_an_old_quantize_config_file_is_enough() -> None:
    w = random_weight(spec(4, 32), 8, 64)
    source = written(Gptq(), {MODULE: w})
    old = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}
    assert only(Gptq(), MemorySource(source.tensors, {}, {"quantize_config.json": old}))[1].equal(w)


def test_symmetric_files_with_zeroed_qzeros_read_as_symmetric() -> None:
    w = random_weight(spec(4, 32, Zero.MIDPOINT), 8, 64)
    source = written(Gptq(), {MODULE: w})
    source.tensors[f"{MODULE}.qzeros"].zero_()
    assert only(Gptq(), source)[1].equal(w)


def replaced(part: str, t: torch.Tensor) -> MemorySource:
    source = written(Gptq(), {MODULE: random_weight(spec(4, 32), 8, 64)})
    return MemorySource(source.tensors | {f"{MODULE}.{part}": t}, source.config)


def configured(**changes: object) -> MemorySource:
    source = written(Gptq(), {MODULE: random_weight(spec(4, 32, Zero.CODES), 8, 64)})
    return MemorySource(source.tensors, {"quantization_config": {**source.config["quantization_config"], **changes}})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (replaced("qweight", torch.zeros(7, 8, dtype=torch.int32)), "qweight.* has 7 rows"),
        (replaced("scales", torch.ones(3, 8).half()), "scales.* has shape .3, 8., expected .2, 8."),
        (replaced("scales", torch.full((2, 8), float("nan")).half()), "up_proj.*NaN"),
        (replaced("qzeros", torch.zeros(2, 2, dtype=torch.int32)), "qzeros.* has shape"),
        (replaced("g_idx", torch.full((64,), 2, dtype=torch.int32)), "up_proj.*desc_act is false"),
        (configured(bits=5), "bits is 5; read are 2, 3, 4, 8"),
        (configured(bits=8), "need another number"),
        (configured(group_size=48), "g_idx is not k // group_size"),
        (configured(group_size=0), "group_size is 0"),
        (configured(sym=True), "sym is true, but qzeros hold zero points"),
        (configured(dynamic={"(": {}}), "dynamic rule"),
        (configured(dynamic={"-:.*up_proj": {}}), "a dynamic rule skips it"),
        (configured(checkpoint_format="marlin"), "'marlin' is not read"),
    ],
)
def test_contradictions_are_named(source: MemorySource, message: str) -> None:
    with pytest.raises(TransloadError, match=message) as caught:
        decoded(Gptq(), source)
    assert "memory" in str(caught.value)


def test_g_idx_out_of_range_is_named() -> None:
    w = random_weight(spec(4, 32, order=True), 8, 64)
    source = written(Gptq(), {MODULE: w})
    for bad in (2, -1):
        source.tensors[f"{MODULE}.g_idx"][3] = bad
        with pytest.raises(FormatError, match=r"up_proj.*g_idx spans"):
            decoded(Gptq(), source)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_broken_files_never_crash(data: st.DataObject) -> None:
    w = {MODULE: random_weight(spec(4, 32, order=True), 8, 64), "lm_head": random_weight(spec(3, -1), 8, 64)}
    survives(Gptq(), data.draw(broken(written(Gptq(), w, {"model.layers.0.mlp.gate": (4, 64)}))))


@pytest.mark.parametrize(
    ("refused", "reason"),
    [
        (QuantSpec(4, 64, Grid.NF4, Zero.NONE), "integer codes"),
        (QuantSpec(5, 32, scale_dtype=torch.float16), "2, 3, 4 or 8 bits"),
        (QuantSpec(4, 32, zero=Zero.MINS, scale_dtype=torch.float16), "zero points"),
        (QuantSpec(4, 32), "not float32"),
    ],
)
def test_what_it_cannot_hold_is_a_sentence(refused: QuantSpec, reason: str) -> None:
    assert reason in (Gptq().cannot_hold(refused, (64, 64)) or "")


def test_a_folder_on_disk_opens(tmp_path: Path) -> None:
    w = random_weight(spec(4, 32, order=True), 24, 100)
    folder = written(Gptq(), {MODULE: w}).save(tmp_path / "model")
    assert transload.open(folder)[MODULE].equal(w)


def test_three_bit_streams_cross_words() -> None:
    words = torch.tensor([[-1, 0, 1]], dtype=torch.int32)
    assert bits.unpack(words, 3, 32)[0].tolist()[:12] == [7] * 10 + [3, 0]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("zero", [Zero.MIDPOINT, Zero.CODES])
@pytest.mark.parametrize("b", [2, 4, 8])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_words_that_stay_packed_make_the_same_bytes(fmt: Gptq, b: int, zero: Zero, order: bool) -> None:
    w = random_weight(spec(b, 32, zero, order), 24, 96)
    source = written(fmt, {MODULE: w})
    (entry,) = fmt.entries(source).values()
    rows = fmt.packed(source, entry)
    assert rows is not None
    assert rows.unpacked().equal(w)
    again = fmt.encode_packed(MODULE, rows)
    assert again is not None
    assert again.keys() == source.tensors.keys()
    assert all(torch.equal(t, source.tensors[name]) for name, t in again.items())


def test_rows_that_do_not_fill_their_words_are_unpacked() -> None:
    source = written(Gptq(), {MODULE: random_weight(spec(4, 20), 8, 60)})
    (entry,) = Gptq().entries(source).values()
    assert Gptq().packed(source, entry) is None
