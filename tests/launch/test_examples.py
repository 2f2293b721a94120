"""The examples are what the commands beside them write, and every file of them is accepted by its reader."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from transload.launch.check import check
from transload.plan.result import Plan

FOLDER = Path(__file__).parents[2] / "examples" / "launch"


def _golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("launch_golden", FOLDER / "golden.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


GOLDEN = _golden()
EXAMPLES = GOLDEN.examples()


def test_all_five_examples_are_here() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_a_plan_that_is_kept_renders_to_what_is_kept(example: Path, tmp_path: Path) -> None:
    new = GOLDEN.rendered(example, tmp_path, plan_again=False)
    lines = GOLDEN.difference(GOLDEN.kept(example), new)
    assert not lines, "\n".join([*lines, "if that is meant: python examples/launch/golden.py --update"])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_the_command_of_an_example_still_plans_the_same_engines(example: Path, tmp_path: Path) -> None:
    new, old = (
        Plan.from_json(files["plan.json"]) for files in (GOLDEN.rendered(example, tmp_path), GOLDEN.kept(example))
    )
    assert [(d.engine, d.recipe, d.parallelism, d.replicas, d.cuts) for d in new.deployments] == [
        (d.engine, d.recipe, d.parallelism, d.replicas, d.cuts) for d in old.deployments
    ]
    assert [(r.node, r.device, r.rank) for r in new.ranks] == [(r.node, r.device, r.rank) for r in old.ranks]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_every_file_of_an_example_is_accepted_by_its_reader(example: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSLOAD_VLLM_PYTHON", raising=False)
    monkeypatch.setattr("transload.launch.live.engine_python", lambda: None)
    findings = check(example / "rendered")
    assert [f for f in findings if f.state == "bad"] == []
    judged = {f.by for f in findings if f.state == "ok"}
    assert {"bash, shellcheck", "compose schema", "kubernetes schemas"} <= judged
