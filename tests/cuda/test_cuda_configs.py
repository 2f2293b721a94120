"""Tile sizes: they fit groups and shared memory, and what was measured takes precedence over the default."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from transload_cuda import configs
from transload_cuda.configs import Ask, Config

DECODE = Ask("a16", 1, 8192, 4096, 2, 128, 2, 90, 132)

ASKS = [
    Ask(scheme, rows, n, 2048, lanes, segment, size, arch, 132)
    for (scheme, size), rows, n, lanes, segment, arch in itertools.product(
        (("a16", 2), ("a16", 4), ("a8", 1)),
        (1, 16, 17, 64, 65, 4096),
        (24, 8192),
        (1, 2),
        (0, 32, 96, 128),
        (80, 86, 90, 100, 120),
    )
]


def test_every_default_fits_its_groups_and_shared_memory() -> None:
    for ask in ASKS:
        found = configs.fitted(configs.default(ask), ask)
        assert ask.width % found.block_k == 0
        assert ask.segment % found.block_k == 0
        assert 1 <= found.splits <= ask.width // found.block_k
        assert found.shared_bytes(ask.x_bytes, ask.lanes) <= configs.SHARED_BYTES.get(
            ask.arch, configs.SMALL_SHARED_BYTES
        )


def test_few_rows_split_k_until_every_multiprocessor_has_work() -> None:
    assert configs.default(replace(DECODE, n=1024)).splits == 16
    assert configs.default(replace(DECODE, n=65536)).splits == 1
    assert configs.default(replace(DECODE, rows=512)).splits == 1
    assert configs.default(replace(DECODE, n=1024, tiles_of_rows=64)).splits == 1


def test_candidates_are_distinct_and_fit() -> None:
    found = configs.candidates(DECODE)
    assert len(found) == len(set(found)) > 20
    assert all(config == configs.fitted(config, DECODE) for config in found)


def test_findings_of_the_user_come_first_then_shipped_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path))
    configs.tuned.cache_clear()
    assert configs.find(DECODE, "NVIDIA X") == configs.fitted(configs.default(DECODE), DECODE)
    monkeypatch.setattr(configs, "MEASURED", {"NVIDIA X": {DECODE.key: (16, 32, 64, 4, 3, 2)}})
    assert configs.find(DECODE, "NVIDIA X") == Config(16, 32, 64, 4, 3, 2)
    assert configs.find(DECODE, "NVIDIA Y") != Config(16, 32, 64, 4, 3, 2)
    path = configs.remember("NVIDIA X", DECODE.key, Config(16, 128, 32, 8, 2, 4))
    assert path.parent == tmp_path / "cuda"
    assert configs.find(DECODE, "NVIDIA X") == Config(16, 128, 32, 8, 2, 4)
    configs.tuned.cache_clear()


@pytest.mark.parametrize("text", ["", "[1]", '{"k": {"block_m": 1}}', '{"k": 3}', '{"k": {"rm": "-rf"}}', "\xff"])
def test_an_unreadable_cache_file_is_as_none(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path))
    path = configs.cache_file("NVIDIA X")
    path.parent.mkdir(parents=True)
    path.write_bytes(text.encode("latin-1"))
    configs.tuned.cache_clear()
    assert configs.tuned("NVIDIA X") == {}
    configs.tuned.cache_clear()
