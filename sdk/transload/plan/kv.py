"""The size of an engine's KV pool, by the arithmetic of vLLM 0.32 (v1/core/kv_cache_utils.py), to the token.

Layers are put into groups whose blocks have one size in bytes; all ranks take the smallest number of blocks; a request
needs some blocks of every group. Checked against vLLM's own get_kv_cache_configs in tests/plan/test_kv.py.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

Names = tuple[str, ...]


class Keeps(enum.Enum):
    """What a layer's cache holds for a request."""

    TOKENS = "tokens"  # every token: full attention, MLA, sparse indexers
    WINDOW = "window"  # the last `span` tokens
    CHUNK = "chunk"  # the current chunk of `span` tokens
    STATE = "state"  # a state of fixed size


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache of one layer on one rank.

    block: tokens in a block. token_bytes: bytes a token (0 for a state). state_bytes: bytes of a state.
    latent: MLA or indexer, whose pages cannot be padded. padded: page size when larger than its content.
    """

    keeps: Keeps
    block: int
    token_bytes: int = 0
    span: int = 0
    state_bytes: int = 0
    latent: bool = False
    padded: int | None = None

    @property
    def page(self) -> int:
        """Bytes of one block of this layer."""
        if self.padded is not None:
            return self.padded
        return self.state_bytes if self.keeps is Keeps.STATE else self.block * self.token_bytes


@dataclass(frozen=True, slots=True)
class Serving:
    """What the engine was started with, as far as the cache is concerned.

    in_flight: tokens scheduled but not settled (batched tokens x concurrent steps). state_blocks: states a request
    holds at most: 2 + speculative tokens with prefix caching, 1 + speculative tokens without.
    """

    max_len: int
    in_flight: int = 0
    dcp: int = 1
    state_blocks: int = 2


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a block table. caches has one entry a layer, in the order of names."""

    names: Names
    caches: tuple[Cache, ...]

    def only(self, names: frozenset[str]) -> Group:
        """The group as one pipeline stage sees it: its own layers, the kind of the whole group."""
        kept = [(n, c) for n, c in zip(self.names, self.caches, strict=True) if n in names]
        return Group(tuple(n for n, _ in kept), tuple(c for _, c in kept) or self.caches[:1])

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers of the group."""
        return sum(c.page for c in self.caches) if self.names else 0


@dataclass(frozen=True, slots=True)
class Pool:
    """A KV pool. blocks: the same on every rank. tokens: as the engine logs it, concurrency x max_len.

    request_blocks: blocks that one request of max_len holds. fits: one such request fits beside the null block.
    short: bytes missing on the tightest rank when it does not fit.
    """

    blocks: int
    tokens: int
    concurrency: float
    request_blocks: int
    fits: bool
    short: int
    block_bytes: tuple[int, ...]


def blocks_of_request(cache: Cache, serving: Serving, length: int | None = None) -> int:
    """Blocks of one layer's group that a request of `length` tokens (default: max_len) holds at most."""
    length = serving.max_len if length is None else length
    if cache.keeps is Keeps.TOKENS:
        return _up(_up(length, serving.dcp), cache.block)
    if cache.keeps is Keeps.WINDOW:
        return _up(min(cache.span - 1 + serving.in_flight, length), cache.block) + 1
    if cache.keeps is Keeps.CHUNK:
        return _up(min(cache.span + serving.in_flight, length), cache.block)
    return serving.state_blocks


def group_layers(caches: Mapping[str, Cache]) -> list[Group]:
    """The groups of a whole model (vLLM's get_kv_cache_groups for layouts that keep a layer's blocks together)."""
    if not caches:
        return []
    if _one_type(tuple(caches.values())):
        return [Group(tuple(caches), tuple(caches.values()))]
    return _groups_of_equal_pages(_equal_pages(caches))


def pool(stages: Sequence[Mapping[str, Cache]], available: Sequence[int], serving: Serving) -> Pool:
    """The pool of an engine whose rank i has the layers stages[i] and available[i] bytes for its cache."""
    merged: dict[str, Cache] = {}
    for stage in stages:
        merged.update(stage)
    groups = group_layers(merged)
    if not groups:
        return Pool(1, serving.max_len, math.inf, 0, True, 0, (0,) * len(stages))
    ranks = [[g.only(frozenset(stage)) for g in groups] for stage in stages]
    return pool_of_groups(ranks, available, serving)


def pool_of_groups(ranks: Sequence[Sequence[Group]], available: Sequence[int], serving: Serving) -> Pool:
    """The same when the groups of every rank are known."""
    needed = sum(max(blocks_of_request(c, serving) for c in g.caches) for g in ranks[0])
    sizes = tuple(max(g.block_bytes for g in groups) for groups in ranks)
    short = max((needed + 1) * size - have for size, have in zip(sizes, available, strict=True))
    blocks = min(max(have, 0) // size for size, have in zip(sizes, available, strict=True) if size)
    concurrency = blocks / needed
    return Pool(blocks, int(concurrency * serving.max_len), concurrency, needed, short <= 0, max(short, 0), sizes)


def longest_context(ranks: Sequence[Sequence[Group]], available: Sequence[int], serving: Serving) -> int:
    """The longest request that fits, at most serving.max_len; 0 when not even one token does."""
    low, high = 0, serving.max_len
    while low < high:
        middle = (low + high + 1) // 2
        if pool_of_groups(ranks, available, replace(serving, max_len=middle)).fits:
            low = middle
        else:
            high = middle - 1
    return low


def align_state(state_bytes: int, block: int, token_bytes: int, latent: bool) -> tuple[int, int]:
    """(block, page) of a model that mixes attention and states: attention's block grows until its page holds a state.

    vLLM 0.32, Platform._align_hybrid_block_size.
    """
    step = max(block, 128) if latent else block
    aligned = max(block, step * _up(state_bytes, step * token_bytes))
    return aligned, aligned * token_bytes


def _one_type(caches: tuple[Cache, ...]) -> bool:
    first = caches[0]
    if any(c.keeps is not first.keeps or c.block != first.block for c in caches):
        return False
    if first.keeps is Keeps.STATE:
        return all(c.page == first.page for c in caches)
    return first.keeps is Keeps.TOKENS or all(c.span == first.span for c in caches)


def _equal_pages(caches: Mapping[str, Cache]) -> dict[str, Cache]:
    """The same caches with pages of one size: larger blocks where that divides, padding where it does not."""
    largest = max(c.page for c in caches.values())
    out: dict[str, Cache] = {}
    for name, cache in caches.items():
        if cache.page == largest:
            out[name] = cache
        elif cache.keeps is not Keeps.STATE and largest % cache.page == 0:
            padded = None if cache.padded is None else largest
            out[name] = replace(cache, block=cache.block * (largest // cache.page), padded=padded)
        else:
            out[name] = replace(cache, padded=largest)
    return out


def _groups_of_equal_pages(caches: Mapping[str, Cache]) -> list[Group]:
    """Groups of one size: as many layers as the rarest kind has, or as the commonest when they are nearly equal."""
    kinds: dict[Cache, list[str]] = {}
    for name, cache in caches.items():
        kinds.setdefault(cache, []).append(name)
    counts = [len(names) for names in kinds.values()]
    size = max(counts) if max(counts) < min(counts) * 1.5 else min(counts)
    groups = []
    for cache, names in kinds.items():
        number = _up(len(names), size)
        groups += [Group(tuple(names[i::number]), (cache,) * len(names[i::number])) for i in range(number)]
    return groups


def _up(value: int, step: int) -> int:
    return -(-value // step)
