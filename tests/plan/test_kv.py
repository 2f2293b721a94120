"""The KV pool: blocks and tokens equal vLLM's own arithmetic for every kind of cache."""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from transload.plan.kv import Cache, Keeps, Serving, align_state, longest_context, pool, pool_of_groups
from transload.plan.kv import group_layers as grouped

VLLM = os.environ.get("TRANSLOAD_VLLM_PYTHON")
_KEEPS = {"sliding": Keeps.WINDOW, "chunked": Keeps.CHUNK, "state": Keeps.STATE}
GIB = 1 << 30


def _case(stages, available, max_len, in_flight=4096, dcp=1, mode="align", speculative=0):
    return {
        "stages": stages,
        "available": available,
        "max_len": max_len,
        "in_flight": in_flight,
        "dcp": dcp,
        "mode": mode,
        "speculative": speculative,
    }


def _layers(start, stop, **cache):
    return {f"layers.{i}": cache for i in range(start, stop)}


def _hybrid(layers, every, attention, other):
    return {f"layers.{i}": attention if (i + 1) % every == 0 else other for i in range(layers)}


FULL = {"kind": "full", "block": 16, "bytes": 2048}
MLA = {"kind": "mla", "block": 64, "bytes": 1152}
INDEXER = {"kind": "indexer", "block": 64, "bytes": 132}
SLIDING = {"kind": "sliding", "block": 16, "bytes": 2048, "span": 1024}
_STATE_BLOCK, _STATE_PAGE = align_state(2_146_304, 16, 2048, latent=False)
ATTENTION_OF_HYBRID = {"kind": "full", "block": _STATE_BLOCK, "bytes": 2048}
STATE = {"kind": "state", "block": _STATE_BLOCK, "bytes": 2_146_304, "padded": _STATE_PAGE}

CASES = {
    "full": _case([_layers(0, 28, **FULL)], [7 * GIB + 12345], 32768),
    "full-tp2-unequal-memory": _case([_layers(0, 28, **FULL)] * 2, [7 * GIB, 5 * GIB], 32768),
    "mla": _case([_layers(0, 61, **MLA)], [40 * GIB], 131072),
    "mla-dcp8": _case([_layers(0, 61, **MLA)], [40 * GIB], 131072, dcp=8),
    "mla-with-indexer": _case(
        [{**_layers(0, 78, **MLA), **{f"layers.{i}.indexer": INDEXER for i in range(78)}}], [30 * GIB], 200000
    ),
    "sliding": _case([_layers(0, 30, **SLIDING)], [3 * GIB], 65536),
    "full-and-sliding-1-to-5": _case([_hybrid(60, 6, FULL, SLIDING)], [20 * GIB + 7], 131072, in_flight=16384),
    "full-and-sliding-12-13": _case([{**_layers(0, 12, **FULL), **_layers(12, 25, **SLIDING)}], [9 * GIB], 32768),
    "full-and-wider-sliding": _case([_hybrid(48, 6, FULL, {**SLIDING, "bytes": 4096})], [20 * GIB], 65536),
    "full-and-odd-sliding": _case([_hybrid(48, 6, FULL, {**SLIDING, "bytes": 1600})], [20 * GIB], 65536),
    "chunked-local": _case(
        [_hybrid(48, 4, FULL, {"kind": "chunked", "block": 16, "bytes": 2048, "span": 8192})], [20 * GIB], 262144
    ),
    "state": _case([_hybrid(60, 4, ATTENTION_OF_HYBRID, STATE)], [25 * GIB], 262144),
    "state-speculative": _case([_hybrid(60, 4, ATTENTION_OF_HYBRID, STATE)], [25 * GIB], 65536, speculative=2),
    "state-without-prefix-cache": _case([_hybrid(48, 4, ATTENTION_OF_HYBRID, STATE)], [25 * GIB], 65536, mode="none"),
    "pp-uneven": _case([_layers(0, 20, **FULL), _layers(20, 61, **FULL)], [6 * GIB, 9 * GIB + 1], 40960),
    "pp-uneven-mla": _case([_layers(0, 33, **MLA), _layers(33, 61, **MLA)], [6 * GIB, 5 * GIB], 40960),
    "pp-hybrid": _case(
        [
            dict(list(_hybrid(60, 4, ATTENTION_OF_HYBRID, STATE).items())[:22]),
            dict(list(_hybrid(60, 4, ATTENTION_OF_HYBRID, STATE).items())[22:]),
        ],
        [9 * GIB, 14 * GIB],
        65536,
    ),
    "too-long": _case([_layers(0, 28, **FULL)], [1 * GIB], 65536),
    "exactly-one-request-and-null-block": _case([_layers(0, 4, **FULL)], [(64 + 1) * 4 * 16 * 2048], 1024),
    "one-byte-short": _case([_layers(0, 4, **FULL)], [(64 + 1) * 4 * 16 * 2048 - 1], 1024),
}


def _cache(c) -> Cache:
    if c["kind"] == "state":
        return Cache(Keeps.STATE, c["block"], state_bytes=c["bytes"], padded=c.get("padded"))
    keeps = _KEEPS.get(c["kind"], Keeps.TOKENS)
    return Cache(keeps, c["block"], c["bytes"], c.get("span", 0), latent=c["kind"] in ("mla", "indexer"))


def _ours(case):
    serving = Serving(
        case["max_len"], case["in_flight"], case["dcp"], case["speculative"] + (2 if case["mode"] == "align" else 1)
    )
    stages = [{name: _cache(c) for name, c in stage.items()} for stage in case["stages"]]
    return pool(stages, case["available"], serving)


def _vllm(cases):
    if not VLLM:
        pytest.skip("TRANSLOAD_VLLM_PYTHON does not name the python of a vLLM installation")
    script = Path(__file__).with_name("vllm_kv.py")
    run = subprocess.run(
        [VLLM, str(script)], input=json.dumps(cases), capture_output=True, text=True, check=False, timeout=180
    )
    answers = [line for line in run.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert answers, run.stderr[-2000:]
    return json.loads(answers[0].removeprefix("ANSWERS "))


def _random_cases(count: int):
    rng = random.Random(8)
    kinds = [FULL, SLIDING, {**SLIDING, "span": 4096}, {"kind": "chunked", "block": 16, "bytes": 2048, "span": 8192}]
    for _ in range(count):
        layers, other = rng.randint(2, 64), rng.choice(kinds)
        stage = {f"layers.{i}": rng.choice([FULL, other]) for i in range(layers)}
        cut = rng.randint(1, layers - 1)
        stages = [dict(list(stage.items())[:cut]), dict(list(stage.items())[cut:])] if rng.random() < 0.4 else [stage]
        memory = [rng.randint(GIB // 4, 40 * GIB) for _ in stages]
        yield _case(stages, memory, rng.randint(100, 200000), in_flight=rng.choice([0, 2048, 16384]))


def test_pool_equals_vllms_own_code() -> None:
    cases = [*CASES.values(), *_random_cases(200)]
    names = [*CASES, *(f"random-{i}" for i in range(200))]
    for name, case, theirs in zip(names, cases, _vllm(cases), strict=True):
        ours = _ours(case)
        if "error" in theirs:
            assert not ours.fits, f"{name}: {theirs['error']}"
            continue
        assert ours.fits, name
        assert (ours.blocks, ours.tokens) == (theirs["blocks"], theirs["tokens"]), name


# What vLLM 0.32.0 answered for the named cases (None: it refused), so that the check needs no vLLM.
GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "plan" / "vllm_kv.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_pool_equals_what_vllm_answered(name: str) -> None:
    ours = _ours(CASES[name])
    assert ([ours.blocks, ours.tokens] if ours.fits else None) == GOLDEN[name]


def test_longest_context_is_the_last_length_that_fits() -> None:
    case = CASES["too-long"]
    serving = Serving(case["max_len"], case["in_flight"])
    groups = grouped({name: _cache(c) for name, c in case["stages"][0].items()})
    longest = longest_context([groups], case["available"], serving)
    assert pool_of_groups([groups], case["available"], Serving(longest, 4096)).fits
    assert not pool_of_groups([groups], case["available"], Serving(longest + 1, 4096)).fits
