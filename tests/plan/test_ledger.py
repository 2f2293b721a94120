"""Weight bytes per rank: equal to vLLM's own parameters, and to a naive count tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transload.models.info import read_model
from transload.plan.ledger import Ledger, weight_bytes
from transload.plan.model import build_model
from transload.plan.modules import Part
from transload.plan.recipes import recipe_by_name, recipe_from_config
from transload.plan.shapes import Shape, even_cuts

_FILES = [Path(__file__).parents[1] / "golden" / "plan" / f"vllm_parameters{part}.json" for part in ("", "_more")]
_READ = [json.loads(file.read_text()) for file in _FILES]
GOLDEN = {"configs": _READ[0]["configs"] | _READ[1]["configs"], "rows": _READ[0]["rows"] + _READ[1]["rows"]}


def _rank_bytes(name: str, shape: Shape, rank: int) -> int:
    info = read_model(GOLDEN["configs"][name])
    model = build_model(info, recipe_from_config(info.quantization))
    stage, dp_rank = rank // shape.tp % shape.pp, rank // (shape.tp * shape.pp)
    cuts = even_cuts(info.layers, shape.pp)
    start = sum(cuts[:stage])
    experts = shape.experts_on(dp_rank * shape.tp + rank % shape.tp, info.experts.count) if info.experts else 0
    ledger = Ledger(model, "cpu")
    if name.endswith(" drafter"):
        without = ledger.stage(shape, start, start + cuts[stage], experts, speculation=False)
        both = ledger.stage(shape, start, start + cuts[stage], experts, speculation=True)
        absorbed = next((w for w in model.mtp if w.module.name == ""), None)
        copies = weight_bytes(absorbed, shape.tp, 1, "cpu").total if absorbed else 0
        return both[Part.MTP].total - copies - sum(p.total for part, p in without.items() if part is Part.MTP)
    parts = ledger.stage(shape, start, start + cuts[stage], experts, speculation=False)
    parts.pop(Part.ABSORBED, None)  # built after loading
    if "+" in name and name.startswith("Qwen3-30B"):
        parts.pop(Part.ROUTER, None)  # see the golden folder's README
    return sum(p.total for p in parts.values())


@pytest.mark.parametrize("name", sorted({row[0] for row in GOLDEN["rows"]}))
def test_bytes_per_rank_equal_vllms_parameters(name: str) -> None:
    rows = [row for row in GOLDEN["rows"] if row[0] == name]
    assert rows
    for _, tp, pp, dp, ep, rank, expected in rows:
        shape = Shape(tp, pp, dp, ep)
        assert _rank_bytes(name, shape, rank) == expected, f"{name} {shape} rank {rank}"


# A second count, written from the shapes in the checkpoint alone: for one rank, walk over every tensor of every layer.


def _naive(info, t: int, d: int, ep: bool, experts: int, bits) -> int:
    def matrix(rows: int, columns: int, name: str) -> int:
        code, scale_group = bits(name)
        size = rows * columns * code // 8
        return size + (rows * (columns // scale_group) * 2 if scale_group else 0)

    heads, kv = info.heads // t, max(1, info.kv_heads // t)
    total = 0
    for i in range(info.layers):
        total += matrix(heads * info.head_dim, info.hidden, "q") + 2 * matrix(kv * info.head_dim, info.hidden, "kv")
        total += matrix(info.hidden, heads * info.head_dim, "o") + 2 * info.hidden * 2
        total += 2 * info.head_dim * 2 if info.qk_norm == "head" else 0
        total += (heads + 2 * kv) * info.head_dim * 2 if info.qkv_bias else 0
        if info.sparse[i]:
            x = info.experts
            width = x.intermediate if ep else x.intermediate // (t * d)
            total += experts * (2 * matrix(width, info.hidden, "expert") + matrix(info.hidden, width, "expert"))
            total += x.count * info.hidden * x.router_bytes + (x.count * 4 if x.bias else 0)
            if x.shared:
                total += 3 * matrix(x.shared // t, info.hidden, "shared")
        else:
            width = info.intermediate // t
            total += 2 * matrix(width, info.hidden, "mlp") + matrix(info.hidden, width, "mlp")
    rows = -(-info.vocab // 64) * 64 // t
    return total + rows * info.hidden * 2 * (1 if info.tied else 2) + info.hidden * 2


CASES = [
    ("Qwen2.5-7B", "bf16", 4, 1, False),
    ("Qwen2.5-7B", "int4-g128", 2, 1, False),
    ("Qwen3-8B", "int4-g64", 4, 1, False),
    ("Qwen3-30B-A3B", "int4-g32", 2, 2, False),
    ("Qwen3-30B-A3B", "int4-g128", 4, 1, True),
    ("GLM-4.6", "int4-g128", 4, 1, False),
    ("GLM-4.6", "int4-g128-experts", 2, 4, True),
    ("Llama", "int4-g128", 8, 1, False),
]


@pytest.mark.parametrize(("name", "recipe", "t", "d", "ep"), CASES, ids=lambda v: str(v))
def test_bytes_per_rank_equal_a_naive_count(name: str, recipe: str, t: int, d: int, ep: bool) -> None:
    info = read_model(GOLDEN["configs"][name])
    shape = Shape(t, 1, d, ep)
    experts = shape.experts_on(0, info.experts.count) if info.experts else 0
    group = int(recipe.split("-g")[1].split("-")[0]) if "-g" in recipe else 0
    only_experts = recipe.endswith("-experts")

    def bits(part: str) -> tuple[int, int]:
        return (4, group) if group and (part == "expert" or not only_experts) else (16, 0)

    parts = Ledger(build_model(info, recipe_by_name(recipe)), "cpu").stage(shape, 0, info.layers, experts, False)
    assert sum(p.total for p in parts.values()) == _naive(info, t, d, ep, experts, bits)


def test_uneven_experts_make_the_first_ranks_fatter() -> None:
    shape = Shape(tp=3, ep=True)
    assert [shape.experts_on(r, 128) for r in range(3)] == [43, 43, 42]


def test_even_cuts_follow_vllm() -> None:
    assert even_cuts(61, 4) == (15, 15, 16, 15)
    assert even_cuts(10, 4) == (2, 3, 3, 2)
    assert even_cuts(80, 16) == (5,) * 16
