"""Every rendered command line passes vLLM 0.32's own parser and create_engine_config: 40 plans, one child process."""

from __future__ import annotations

import json
import os

import pytest

from launch.plans import CASES, Case, model
from transload.launch import EngineCommand, commands, live
from transload.launch.live import Verdict
from transload.launch.topology import instances

PYTHON = os.environ.get(live.VARIABLE)
pytestmark = pytest.mark.skipif(not PYTHON, reason=f"{live.VARIABLE} does not name the python of a vLLM installation")

Judged = dict[str, list[tuple[EngineCommand, Verdict]]]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Judged:
    """Case -> its `vllm serve` commands with vLLM's verdict; all are judged by one process."""
    rows: list[tuple[str, EngineCommand, str]] = []
    for case in CASES:
        folder = tmp_path_factory.getbasetemp() / "configs" / case.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(model(case.name)))
        for command in commands(case.plan(), "/models/it's a model", site=case.site):
            if command.argv[:2] == ("vllm", "serve"):
                rows.append((case.id, command, str(folder)))
    python, folders = str(PYTHON), [folder for _, _, folder in rows]
    version, verdicts = live.judge(python, [c for _, c, _ in rows], folders, timeout=1200)
    assert version.startswith("0.32")
    out: Judged = {}
    for (name, command, _), verdict in zip(rows, verdicts, strict=True):
        out.setdefault(name, []).append((command, verdict))
    return out


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_the_engine_takes_every_command(case: Case, judged: Judged) -> None:
    plan = case.plan()
    engines = instances(plan, case.site.form)
    assert len(engines[0].parts) == case.nodes
    for command, verdict in judged[case.id]:
        assert verdict.parser is None, verdict.parser
        assert verdict.config is None, verdict.config
        assert verdict.facts is not None
        size = plan.deployments[command.deployment].parallelism
        assert verdict.facts["world_size"] == size.tp * size.pp
        assert verdict.facts["data_parallel_size"] == size.dp
        assert verdict.facts["max_model_len"] == plan.context
        engine = engines[command.instance]
        assert verdict.facts["layers"] == plan.deployments[command.deployment].cuts[0]
        if engine.shape == "native":
            assert verdict.facts["local_world_size"] == min(len(command.devices), size.tp * size.pp)
        if engine.shape == "dp":
            part = next(p for p in engine.parts if p.node == command.node)
            assert verdict.facts["data_parallel_size_local"] == len(part.dp_ranks)
