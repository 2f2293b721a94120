"""Layer cuts for pipeline stages of unequal memory: the cut that leaves the most KV blocks on the poorest stage.

For a given number of blocks it is easy to say whether a cut exists: fill stage after stage with as many layers as fit.
More blocks never make it easier, so a binary search on the number of blocks gives the optimum. With free stage order, a
table over "how many devices of each kind are used" replaces the single pass; taking more layers never hurts, because
what is left is then a suffix of what would be left otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, product


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
    kinds = tuple(range(len(capacity)))
    return _search(chain, capacity, lambda search, blocks: search.in_order(blocks, kinds))


def best_order(chain: Chain, capacity: Sequence[int], counts: Sequence[int]) -> LayerCut | None:
    """The best order and cut when counts[k] devices with capacity[k] bytes may be placed in any order."""
    return _search(chain, capacity, lambda search, blocks: search.any_order(blocks, tuple(counts)))


class _Feasible:
    """Whether a number of blocks can be reached, and by which cut."""

    def __init__(self, chain: Chain, capacity: Sequence[int]) -> None:
        self.chain, self.capacity = chain, capacity
        self.weights = [0, *accumulate(chain.weights)]
        self.block = [0, *accumulate(chain.block)]
        self.layers = len(chain.weights)

    def cost(self, start: int, stop: int, blocks: int) -> int:
        """Bytes of layers start .. stop - 1 with their caches, and of the ends they include."""
        ends = (self.chain.first if start == 0 else 0) + (self.chain.last if stop == self.layers else 0)
        return self.weights[stop] - self.weights[start] + blocks * (self.block[stop] - self.block[start]) + ends

    def reach(self, start: int, kind: int, blocks: int, stages_after: int) -> int:
        """The furthest layer a stage may end before, -1 when it cannot take even one."""
        low, high = start, self.layers - stages_after
        if stages_after == 0:
            return high if high > start and self.cost(start, high, blocks) <= self.capacity[kind] else -1
        while low < high:
            middle = (low + high + 1) // 2
            if self.cost(start, middle, blocks) <= self.capacity[kind]:
                low = middle
            else:
                high = middle - 1
        return low if low > start else -1

    def in_order(self, blocks: int, kinds: tuple[int, ...]) -> LayerCut | None:
        """A cut for a fixed order of stages."""
        start, cuts = 0, []
        for i, kind in enumerate(kinds):
            stop = self.reach(start, kind, blocks, len(kinds) - 1 - i)
            if stop < 0:
                return None
            cuts.append(stop - start)
            start = stop
        return LayerCut(blocks, tuple(cuts), kinds) if start == self.layers else None

    def any_order(self, blocks: int, counts: tuple[int, ...]) -> LayerCut | None:
        """A cut when devices may stand in any order: furthest[used] = most layers placed with these devices."""
        stages = sum(counts)
        furthest: dict[tuple[int, ...], tuple[int, tuple[int, ...], int]] = {(0,) * len(counts): (0, (), -1)}
        for used in sorted(product(*(range(c + 1) for c in counts)), key=sum):
            if sum(used) == 0:
                continue
            options = []
            for kind, number in enumerate(used):
                before = (*used[:kind], number - 1, *used[kind + 1 :])
                if number and before in furthest:
                    stop = self.reach(furthest[before][0], kind, blocks, stages - sum(used))
                    if stop > 0:
                        options.append((stop, before, kind))
            if options:
                furthest[used] = max(options)
        return self._trace(blocks, furthest, counts)

    def _trace(
        self, blocks: int, furthest: dict[tuple[int, ...], tuple[int, tuple[int, ...], int]], counts: tuple[int, ...]
    ) -> LayerCut | None:
        if counts not in furthest or furthest[counts][0] != self.layers:
            return None
        cuts, kinds, at = [], [], counts
        while sum(at):
            stop, before, kind = furthest[at]
            cuts.append(stop - furthest[before][0])
            kinds.append(kind)
            at = before
        return LayerCut(blocks, tuple(reversed(cuts)), tuple(reversed(kinds)))


def _search(
    chain: Chain, capacity: Sequence[int], attempt: Callable[[_Feasible, int], LayerCut | None]
) -> LayerCut | None:
    search = _Feasible(chain, capacity)
    best = attempt(search, 0)
    if best is None:
        return None
    low, high = 0, max(capacity) // max(min(chain.block), 1)
    while low < high:
        middle = (low + high + 1) // 2
        found = attempt(search, middle)
        if found is None:
            high = middle - 1
        else:
            low, best = middle, found
    return best
