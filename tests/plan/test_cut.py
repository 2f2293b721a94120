"""Layer cuts: equal to trying every cut and every order, and to OR-Tools' CP-SAT."""

from __future__ import annotations

import random
from itertools import combinations, permutations

import pytest
from ortools.sat.python import cp_model

from transload.plan.cut import Chain, LayerCut, best_cut, best_order


def _blocks(chain: Chain, cuts: tuple[int, ...], capacity: tuple[int, ...]) -> int:
    """KV blocks of a cut by counting, -1 when its weights do not fit."""
    start, blocks = 0, 1 << 60
    for i, (count, have) in enumerate(zip(cuts, capacity, strict=True)):
        stop = start + count
        weights = sum(chain.weights[start:stop]) + (chain.first if i == 0 else 0)
        weights += chain.last if i == len(cuts) - 1 else 0
        if weights > have:
            return -1
        blocks = min(blocks, (have - weights) // sum(chain.block[start:stop]))
        start = stop
    return blocks


def _every_cut(layers: int, stages: int):
    for bounds in combinations(range(1, layers), stages - 1):
        yield tuple(b - a for a, b in zip((0, *bounds), (*bounds, layers), strict=True))


def _random_chain(rng: random.Random, layers: int) -> Chain:
    weights = tuple(rng.randint(1, 60) for _ in range(layers))
    block = tuple(rng.randint(1, 5) for _ in range(layers))
    return Chain(weights, block, rng.randint(0, 80), rng.randint(0, 80))


@pytest.mark.parametrize("seed", range(60))
def test_the_best_cut_is_the_best_of_all_cuts(seed: int) -> None:
    rng = random.Random(seed)
    layers, stages = rng.randint(4, 12), rng.randint(1, 4)
    chain = _random_chain(rng, layers)
    capacity = tuple(rng.randint(60, 500) for _ in range(stages))
    best = max(_blocks(chain, cuts, capacity) for cuts in _every_cut(layers, stages))
    found = best_cut(chain, capacity)
    assert (found.blocks if found else -1) == best
    if found:
        assert _blocks(chain, found.cuts, capacity) == best


@pytest.mark.parametrize("seed", range(30))
def test_the_best_order_is_the_best_of_all_orders(seed: int) -> None:
    rng = random.Random(1000 + seed)
    layers, counts = rng.randint(5, 10), (rng.randint(1, 2), rng.randint(1, 2))
    chain = _random_chain(rng, layers)
    capacity = (rng.randint(60, 300), rng.randint(200, 600))
    kinds = [k for k, count in enumerate(counts) for _ in range(count)]
    best = max(
        _blocks(chain, cuts, tuple(capacity[k] for k in order))
        for order in set(permutations(kinds))
        for cuts in _every_cut(layers, len(kinds))
    )
    found = best_order(chain, capacity, counts)
    assert (found.blocks if found else -1) == best
    if found:
        assert sorted(found.kinds) == kinds
        assert _blocks(chain, found.cuts, tuple(capacity[k] for k in found.kinds)) == best


def _cp_sat(chain: Chain, capacity: tuple[int, ...]) -> int:
    """The most blocks by constraint programming: x[l, s] says that layer l is on stage s."""
    layers, stages, top = len(chain.weights), len(capacity), max(capacity)
    model = cp_model.CpModel()
    at = [model.new_int_var(0, stages - 1, f"at{i}") for i in range(layers)]
    x = [[model.new_bool_var(f"x{i}_{s}") for s in range(stages)] for i in range(layers)]
    blocks = model.new_int_var(0, top, "blocks")
    model.add(at[0] == 0)
    model.add(at[-1] == stages - 1)
    for i in range(layers):
        model.add_exactly_one(x[i])
        model.add(at[i] == sum(s * x[i][s] for s in range(stages)))
        if i:
            model.add(at[i] >= at[i - 1])
            model.add(at[i] <= at[i - 1] + 1)
    for s in range(stages):
        share = []
        for i in range(layers):
            part = model.new_int_var(0, top * max(chain.block), f"part{i}_{s}")
            model.add(part == blocks * chain.block[i]).only_enforce_if(x[i][s])
            model.add(part == 0).only_enforce_if(x[i][s].negated())
            share.append(part)
        ends = (chain.first if s == 0 else 0) + (chain.last if s == stages - 1 else 0)
        model.add(sum(share) + sum(chain.weights[i] * x[i][s] for i in range(layers)) + ends <= capacity[s])
    model.maximize(blocks)
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = 20
    solver.parameters.num_workers = 2
    status = solver.solve(model)
    return round(solver.objective_value) if status == cp_model.OPTIMAL else -1


@pytest.mark.parametrize("seed", range(6))
def test_the_best_cut_equals_cp_sat(seed: int) -> None:
    rng = random.Random(2000 + seed)
    layers, stages = rng.randint(12, 24), rng.randint(2, 5)
    chain = _random_chain(rng, layers)
    capacity = tuple(rng.randint(250, 700) for _ in range(stages))
    found = best_cut(chain, capacity)
    assert (found.blocks if found else -1) == _cp_sat(chain, capacity)


@pytest.mark.parametrize("seed", range(4))
def test_deep_models_on_unequal_stages_equal_cp_sat(seed: int) -> None:
    rng = random.Random(3000 + seed)
    layers, stages = rng.randint(40, 61), rng.randint(4, 8)
    chain = _random_chain(rng, layers)
    average = (sum(chain.weights) + 40 * sum(chain.block)) // stages
    capacity = tuple(rng.randint(average // 2, average * 3 // 2) for _ in range(stages))
    found = best_cut(chain, capacity)
    assert found is not None
    assert found.blocks == _cp_sat(chain, capacity)


def test_a_small_card_gets_fewer_layers() -> None:
    chain = Chain((10,) * 12, (1,) * 12, first=5, last=5)
    found = best_order(chain, (100, 50), (1, 1))
    assert found is not None
    assert isinstance(found, LayerCut)
    assert dict(zip(found.kinds, found.cuts, strict=True)) == {0: 8, 1: 4}
