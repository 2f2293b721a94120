"""What a log says, read from that of a real start."""

# ruff: noqa: E501  (log lines are as long as they are)

from __future__ import annotations

from functools import reduce

import pytest

from transload.serve.logs import Progress, advance, message


def test_a_real_start_is_understood(start_log: str) -> None:
    end = reduce(advance, start_log.splitlines(), Progress())
    assert (end.version, end.kv_tokens, end.kv_gib, end.init_seconds) == ("0.32.0", 87296, 1.0, 90.49)
    assert end.stage == "starting the server"


def test_stages_come_in_the_order_of_a_start(start_log: str) -> None:
    stages: dict[str, None] = {}
    now = Progress()
    for line in start_log.splitlines():
        now = advance(now, line)
        stages[now.stage] = None
    assert list(stages) == [
        "starting", "reading the configuration of Qwen2ForCausalLM", "starting workers", "joining the other workers",
        "workers joined", "loading weights", "weights loaded", "compiling", "starting the server",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:01<00:01]", "fraction", 0.5),
        ("(Worker_TP0 pid=1) INFO 11-22 05:00:00 [m.py:1] Model loading took 28.71 GiB memory and 61.2 seconds",
         "weights_gib", 28.71),
        ("(EngineCore_DP0 pid=1) INFO 11-22 05:00:00 [m.py:1] GPU KV cache size: 1,013,952 tokens", "kv_tokens", 1013952),
        ("INFO 11-22 05:00:00 [w.py:1] Available KV cache memory: 40.25 GiB", "kv_gib", 40.25),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  30%|###       | 20/67", "stage", "capturing graphs"),
        ("(APIServer pid=1) INFO 11-22 07:04:34 [loggers.py:335] Engine 000: Avg prompt throughput: 6.8 tokens/s, Avg "
         "generation throughput: 2.5 tokens/s, Running: 3 reqs, Waiting: 1 reqs, CPU KV cache usage: 0.0%", "running", 3),
        ("INFO 11-22 07:04:34 [launcher.py:241] [shutdown] API server: shutdown triggered", "draining", True),
        ("a sentence that says nothing", "stage", "starting"),
    ],
)  # fmt: skip
def test_lines(line: str, field: str, value: object) -> None:
    assert getattr(advance(Progress(), line), field) == value


def test_the_smallest_cache_and_the_largest_weights_of_several_workers_count() -> None:
    said = ("Available KV cache memory: 4.5 GiB", "Available KV cache memory: 3.5 GiB",
            "Model loading took 2.0 GiB", "Model loading took 1.5 GiB")  # fmt: skip
    end = reduce(advance, said, Progress())
    assert (end.kv_gib, end.weights_gib) == (3.5, 2.0)


def test_a_line_that_says_nothing_changes_nothing() -> None:
    before = Progress(stage="loading weights")
    assert advance(before, "") is before


def test_prefixes_are_taken_off() -> None:
    assert message("(Worker pid=1) ERROR 11-22 07:02:29 [x.py:1] KeyError: 'a'") == ("ERROR", "KeyError: 'a'")
    assert message("plain") == ("", "plain")
