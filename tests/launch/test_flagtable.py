"""The frozen flag tables: they are what the parser says, and they catch what it would."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from launch.plans import CASES, Case
from transload.launch import commands, flagtable, live
from transload.launch.ascend_rules import contradictions
from transload.plan.engines import ENGINES

PYTHON = os.environ.get(live.VARIABLE)
ROOT = Path(__file__).parents[2]
GOOD = ["/models/m", "--tensor-parallel-size", "8", "--max-model-len", "128k", "--enable-expert-parallel"]


def test_every_engine_of_the_planner_has_a_table() -> None:
    assert {e.label for e in ENGINES} == set(flagtable.TABLES)


@pytest.mark.skipif(not PYTHON, reason=f"{live.VARIABLE} does not name the python of a vLLM installation")
def test_the_table_of_0_32_is_what_the_real_parser_has(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    subprocess.run([str(PYTHON), str(ROOT / "ci" / "engine_flags.py"), "vllm", str(out)], check=True, timeout=280)
    release, rows = flagtable.table("vllm-0.32")
    assert json.loads(out.read_text()) == {"engine": "vllm", "version": release, "rows": rows}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_rendered_commands_have_no_problem(case: Case) -> None:
    plan = case.plan()
    for command in commands(plan, "/models/it's", site=case.site):
        if command.argv[0] == "vllm":
            assert flagtable.problems(command.argv[2:], plan.deployments[command.deployment].engine) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*GOOD, "--bogus", "1"], "--bogus: vLLM 0.32.0 has no such option"),
        ([*GOOD, "--tensor-paralel-size", "8"], "nearest is --tensor-parallel-size"),
        ([*GOOD, "--kv-cache-dtype", "fp9"], "--kv-cache-dtype fp9: not one of its choices; nearest is fp8"),
        ([*GOOD, "--data-parallel-size", "two"], "--data-parallel-size two: expected a number (int)"),
        ([*GOOD, "--max-num-batched-tokens", "8 k"], "expected a size such as 32k"),
        ([*GOOD, "--gpu-memory-utilization=high"], "expected a number (float)"),
        ([*GOOD, "--headless", "yes"], "--headless: takes no value, found 'yes'"),
        ([*GOOD, "--port"], "--port: takes one value, found 0"),
        ([*GOOD, "--compilation-config", '{"cudagraph_mod": "FULL"}'], "has no key 'cudagraph_mod'; nearest is"),
        ([*GOOD, "--speculative-config", "{mtp}"], "--speculative-config: not valid JSON"),
        (["--port", "8000"], "expected one model before the options, found 0"),
        (["a", "b", "--port", "8000"], "expected one model before the options, found 2"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_mistakes_are_found(argv: list[str], said: str) -> None:
    problems = flagtable.problems(argv, "vllm==0.32")
    assert len(problems) == 1
    assert said in problems[0]


@pytest.mark.parametrize(
    "more",
    [
        ["--gpu_memory_utilization", "0.9"],
        ["-tp", "8"],
        ["--max-model-len=auto"],
        ["--no-enable-prefix-caching"],
        ["--compilation-config.mode", "3"],
        ["--served-model-name", "a", "b"],
        ["--seed", "-1"],
    ],
    ids=lambda v: v[0],
)
def test_other_spellings_that_the_parser_takes_are_taken(more: list[str]) -> None:
    assert flagtable.problems([*GOOD, *more], "vllm==0.32") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"enable_flashcom1": true}', "reads no key 'enable_flashcom1'; nearest is enable_flashcomm1"),
        ('{"eplb_config": {"dynamic_epbl": true}}', "eplb_config has no key 'dynamic_epbl'; nearest is dynamic_eplb"),
        ('{"ascend_compilation_config": {"fuse_norm_qant": 1}}', "nearest is fuse_norm_quant"),
        ('{"enable_npugraph_ex": true}', "it belongs in 'ascend_compilation_config'"),
        ("[1]", "expected a JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_keys_that_vllm_ascend_would_ignore_without_a_word_are_found(text: str, said: str) -> None:
    problems = flagtable.problems([*GOOD, "--additional-config", text], "vllm-ascend==0.23")
    assert len(problems) == 1
    assert said in problems[0]


def test_keys_that_vllm_ascend_reads_are_taken() -> None:
    text = '{"weight_nz_mode": 2, "finegrained_tp_config": {"lmhead_tensor_parallel_size": 8}, "refresh": true}'
    assert flagtable.problems([*GOOD, "--additional-config", text], "vllm-ascend==0.23") == []


@pytest.mark.parametrize(
    ("sizes", "config", "said"),
    [
        ("--data-parallel-size 4", {"finegrained_tp_config": {"lmhead_tensor_parallel_size": 3}}, "3 must divide"),
        ("--data-parallel-size 4", {"finegrained_tp_config": {"lmhead_tensor_parallel_size": 2}}, None),
        ("--tensor-parallel-size 2 --data-parallel-size 2",
         {"finegrained_tp_config": {"oproj_tensor_parallel_size": 2}}, "needs --tensor-parallel-size 1, found 2"),
        ("", {"profiling_chunk_config": {"enabled": True}}, "needs --pipeline-parallel-size above 1"),
        ("--pipeline-parallel-size 2", {"profiling_chunk_config": {"enabled": True}}, None),
        ("", {"eplb_config": {"dynamic_eplb": True}}, "needs the variable DYNAMIC_EPLB=true"),
        ("", {"finegrained_tp_config": [1], "eplb_config": 3}, None),
    ],
)  # fmt: skip
def test_what_vllm_ascend_would_refuse_beside_the_sizes(
    sizes: str, config: dict[str, object], said: str | None
) -> None:
    found = contradictions(["/m", *sizes.split(), "--additional-config", json.dumps(config)], {})
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_a_variable_allows_what_needs_it() -> None:
    argv = ["/m", "--additional-config", '{"eplb_config": {"dynamic_eplb": true}}']
    assert contradictions(argv, {"DYNAMIC_EPLB": "true"}) == []
    assert contradictions(["/m", "--additional-config", "{"], {}) == contradictions(["/m"], {}) == []
