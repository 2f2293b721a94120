"""The neutral format holds every QTensor exactly, and config.json and tensors must tell the same story."""

from __future__ import annotations

import copy

import pytest
import torch
from hostile import broken, survives
from hypothesis import given, settings
from memory_source import MemorySource, decoded, random_weight, written

from transload.errors import FormatError
from transload.formats.neutral import Neutral
from transload.quant import ActSpec, Grid, QTensor, QuantSpec, Zero, stack_experts

SPECS = {
    "int4 g32 sym": QuantSpec(4, 32, scale_dtype=torch.float16),
    "int4 g32 asym": QuantSpec(4, 32, zero=Zero.CODES, scale_dtype=torch.bfloat16),
    "int4 g32 mins": QuantSpec(4, 32, zero=Zero.MINS, scale_dtype=torch.float16),
    "int4 g32 floats": QuantSpec(4, 32, zero=Zero.FLOATS),
    "int3 channel": QuantSpec(3, -1),
    "int5 act-order": QuantSpec(5, 16, zero=Zero.CODES, act_order=True),
    "int8 w8a8": QuantSpec(8, -1, act=ActSpec(8, -1, static=True)),
    "int4 w4a8 per group": QuantSpec(4, 32, act=ActSpec(8, 32)),
    "nf4 g64": QuantSpec(4, 64, Grid.NF4, Zero.NONE),
    "e2m1 g32": QuantSpec(4, 32, Grid.E2M1, Zero.NONE, torch.bfloat16),
    "int2 g8": QuantSpec(2, 8),
}
FORMAT = Neutral()


@pytest.mark.parametrize("k", [64, 63, 1], ids=lambda k: f"K={k}")
@pytest.mark.parametrize("name", SPECS)
def test_every_spec_round_trips_exactly(name: str, k: int) -> None:
    w = random_weight(SPECS[name], 5, k)
    source = written(FORMAT, {"m": w}, {"norm": (4,)})
    assert decoded(FORMAT, source)["m"].equal(w)
    entries = FORMAT.entries(source)
    assert entries["m"].shape == (5, k)
    assert entries["norm.weight"].spec is None
    assert entries["m"].stored_bytes == sum(t.nbytes for n, t in source.tensors.items() if n.startswith("m."))


def test_experts_keep_their_axis() -> None:
    w = stack_experts([random_weight(SPECS["int4 g32 asym"], 3, 33, seed) for seed in range(4)])
    source = written(FORMAT, {"m": w})
    assert FORMAT.entries(source)["m"].shape == (4, 3, 33)
    assert decoded(FORMAT, source)["m"].equal(w)


def test_eight_bit_floats_round_trip() -> None:
    w = QTensor(
        QuantSpec(8, -1, Grid.E4M3, Zero.NONE), torch.arange(64, dtype=torch.uint8).reshape(2, 32), torch.ones(2, 1)
    )
    assert decoded(FORMAT, written(FORMAT, {"m": w}))["m"].equal(w)


def test_the_scheme_of_most_modules_names_none() -> None:
    weights = {f"m{i}": random_weight(SPECS["int4 g32 sym"], 2, 32) for i in range(5)}
    weights["head"] = random_weight(SPECS["int3 channel"], 2, 32)
    source = written(FORMAT, weights)
    declared = source.config["quantization_config"]
    assert isinstance(declared, dict)
    assert [s.get("modules") for s in declared["schemes"]] == [None, ["head"]]
    assert declared["quant_method"] == "transload"
    assert {name: w.spec for name, w in decoded(FORMAT, source).items()} == {n: w.spec for n, w in weights.items()}


def test_nothing_quantized_is_a_valid_checkpoint() -> None:
    source = written(FORMAT, {}, {"norm": (4,)})
    assert [e.spec for e in FORMAT.entries(source).values()] == [None]


SCHEME = {"bits": 4, "group_size": 32, "grid": "int", "zero": "codes", "scale_dtype": "bfloat16"}
CONTRADICTIONS = {
    "version": ({"version": 2}, "expected version 1"),
    "no schemes": ({"schemes": {}}, "expected a list"),
    "empty schemes": ({"schemes": []}, "expected a list"),
    "scheme is a number": ({"schemes": [4]}, "a scheme is '4'"),
    "two defaults": ({"schemes": [SCHEME, SCHEME]}, "two schemes name no modules"),
    "no scheme left": ({"schemes": [{**SCHEME, "modules": ["m"]}]}, "no scheme for 'n'"),
    "absent module": ({"schemes": [SCHEME, {**SCHEME, "modules": ["x"]}]}, "names 'x', which has no stored codes"),
    "two schemes for one": (
        {"schemes": [SCHEME, {**SCHEME, "modules": ["m"]}, {**SCHEME, "bits": 8, "modules": ["m"]}]},
        "'m' has two schemes",
    ),
    "modules is a string": ({"schemes": [{**SCHEME, "modules": "m"}]}, "expected a list of names"),
    "bits missing": ({"schemes": [{k: v for k, v in SCHEME.items() if k != "bits"}]}, "lacks 'bits'"),
    "bits of 9": ({"schemes": [{**SCHEME, "bits": 9}]}, "9-bit codes"),
    "bits is true": ({"schemes": [{**SCHEME, "bits": True}]}, "'True' is no integer"),
    "unknown grid": ({"schemes": [{**SCHEME, "grid": "int9"}]}, "int9"),
    "grid is a list": ({"schemes": [{**SCHEME, "grid": []}]}, r"\[\]"),
    "unknown dtype": ({"schemes": [{**SCHEME, "scale_dtype": "float64"}]}, "float64"),
    "dtype is a list": ({"schemes": [{**SCHEME, "scale_dtype": []}]}, "unhashable"),
    "unknown field": ({"schemes": [{**SCHEME, "colour": 1}]}, "unknown field 'colour'"),
    "act is a number": ({"schemes": [{**SCHEME, "act": 8}]}, "act is '8'"),
    "act_order is a number": ({"schemes": [{**SCHEME, "act_order": 1}]}, "neither true nor false"),
    "other bits": ({"schemes": [{**SCHEME, "bits": 8}]}, r"codes is U8 \(5, 32\), expected U8 \(5, 64\)"),
    "other group": ({"schemes": [{**SCHEME, "group_size": 16}]}, r"scales is BF16 \(5, 2\), expected BF16 \(5, 4\)"),
    "other scale dtype": ({"schemes": [{**SCHEME, "scale_dtype": "float16"}]}, "expected F16"),
    "other zero": ({"schemes": [{**SCHEME, "zero": "midpoint"}]}, "zeros is U8 .* expected nothing"),
    "mins asked for": ({"schemes": [{**SCHEME, "zero": "mins"}]}, "expected nothing|mins is missing"),
    "act-order asked for": ({"schemes": [{**SCHEME, "act_order": True}]}, "g_idx is missing, expected I32"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused_by_name(case: str) -> None:
    change, words = CONTRADICTIONS[case]
    weights = {name: random_weight(SPECS["int4 g32 asym"], 5, 64) for name in ("m", "n")}
    source = written(FORMAT, weights)
    config = copy.deepcopy(source.config)
    assert isinstance(config["quantization_config"], dict)
    config["quantization_config"].update(change)
    with pytest.raises(FormatError, match=words) as e:
        FORMAT.entries(MemorySource(source.tensors, config))
    assert str(e.value).startswith("memory")


@pytest.mark.parametrize("part", ["scales", "zeros", "shape"])
def test_a_missing_part_is_named(part: str) -> None:
    source = written(FORMAT, {"m": random_weight(SPECS["int4 g32 asym"], 5, 64)})
    tensors = {name: t for name, t in source.tensors.items() if name != f"m.{part}"}
    with pytest.raises(FormatError, match=f"'m': {part} is missing"):
        FORMAT.entries(MemorySource(tensors, source.config))


@settings(max_examples=150, deadline=None)
@given(
    broken(
        written(
            FORMAT, {"m": random_weight(SPECS["int5 act-order"], 4, 48), "n": random_weight(SPECS["nf4 g64"], 4, 64)}
        )
    )
)
def test_broken_checkpoints_are_read_or_refused(source: MemorySource) -> None:
    survives(FORMAT, source)
