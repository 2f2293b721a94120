"""Layer cuts for pipeline stages of unequal memory: the cut that leaves the most KV blocks on the poorest stage.

For a given number of blocks, a table says where each stage may end; every stage runs at least one layer. More blocks
never make a cut easier, so a binary search on the number of blocks gives the optimum. With free stage order the table
is over "how many devices of each kind are used", which is small because devices of a kind are interchangeable.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise


@dataclass(frozen=True, slots=True)
class Chain:
    """Layers in order. weights[i], block[i]: bytes of layer i and of its share of one KV block.

    first, last: extra bytes of the first stage (embedding) and of the last (head).
    """

    weights: tuple[int, ...]
    block: tuple[int, ...]
    first: int = 0
    last: int = 0


@dataclass(frozen=True, slots=True)
class LayerCut:
    """blocks that fit, layers of each stage, and the kind of device of each stage."""

    blocks: int
    cuts: tuple[int, ...]
    kinds: tuple[int, ...]


def best_cut(chain: Chain, capacity: Sequence[int]) -> LayerCut | None:
    """The best cut for stages in the given order; capacity[i] bytes for weights and cache. None when nothing fits."""
    return _search(chain, capacity, [{i: 1} for i in range(len(capacity))])


def best_order(chain: Chain, capacity: Sequence[int], counts: Sequence[int]) -> LayerCut | None:
    """The best order and cut when counts[k] devices with capacity[k] bytes may be placed in any order."""
    return _search(chain, capacity, [dict(enumerate(counts))] * sum(counts))


def _search(chain: Chain, capacity: Sequence[int], stages: Sequence[Mapping[int, int]]) -> LayerCut | None:
    """stages[i]: the kinds that may run stage i, with how many devices of each there are in total."""
    best = _Table(chain, capacity, 0).cut(stages)
    low, high = 0, max(capacity) // max(min(chain.block), 1)
    while best is not None and low < high:
        middle = (low + high + 1) // 2
        found = _Table(chain, capacity, middle).cut(stages)
        if found is None:
            high = middle - 1
        else:
            low, best = middle, found
    return best


Used = tuple[tuple[int, int], ...]


class _Table:
    """Which cuts reach a number of blocks. ends[kind][s]: the last position a stage that starts at s may end at."""

    def __init__(self, chain: Chain, capacity: Sequence[int], blocks: int) -> None:
        self.blocks, self.layers = blocks, len(chain.weights)
        sizes = [w + blocks * b for w, b in zip(chain.weights, chain.block, strict=True)]
        sums = [0, *accumulate(sizes)]
        self.ends: list[list[int]] = []
        self.finishes: list[list[bool]] = []
        for have in capacity:
            room = [have - (chain.first if s == 0 else 0) + sums[s] for s in range(self.layers)]
            self.ends.append([min(bisect_right(sums, r) - 1, self.layers - 1) for r in room])
            self.finishes.append([sums[-1] + chain.last <= r for r in room])

    def cut(self, stages: Sequence[Mapping[int, int]]) -> LayerCut | None:
        """A cut over these stages, or None. Positions reached are kept per multiset of used kinds."""
        reached: list[dict[Used, dict[int, tuple[Used, int, int]]]] = [{(): {0: ((), 0, -1)}}]
        for kinds in stages[:-1]:
            step: dict[Used, dict[int, tuple[Used, int, int]]] = {}
            for used, positions in reached[-1].items():
                for kind in _free(kinds, used):
                    into = step.setdefault(_with(used, kind), {})
                    for start in positions:
                        for end in range(start + 1, self.ends[kind][start] + 1):
                            into.setdefault(end, (used, start, kind))
            reached.append({used: found for used, found in step.items() if found})
        for used, positions in reached[-1].items():
            for kind in _free(stages[-1], used):
                for start in positions:
                    if self.finishes[kind][start]:
                        return self._trace(reached, used, start, kind)
        return None

    def _trace(
        self, reached: list[dict[Used, dict[int, tuple[Used, int, int]]]], used: Used, start: int, kind: int
    ) -> LayerCut:
        bounds, kinds = [self.layers, start], [kind]
        for step in reversed(reached[1:]):
            used, start, kind = step[used][start]
            bounds.append(start)
            kinds.append(kind)
        bounds.reverse()
        cuts = tuple(b - a for a, b in pairwise(bounds))
        return LayerCut(self.blocks, cuts, tuple(reversed(kinds)))


def _free(kinds: Mapping[int, int], used: Used) -> list[int]:
    taken = dict(used)
    return [kind for kind, count in kinds.items() if taken.get(kind, 0) < count]


def _with(used: Used, kind: int) -> Used:
    taken = dict(used)
    taken[kind] = taken.get(kind, 0) + 1
    return tuple(sorted(taken.items()))
