"""`transload plan render` and `transload plan check` as a person meets them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch.plans import CASES, model
from transload.cli import app
from transload.errors import TransloadError
from transload.launch import live

BY_ID = {case.id: case for case in CASES}
TWO = BY_ID["GLM-5-2x8x910B3-w4a8-tp8-dp2-ep1"]
CLUSTER = """
nodes:
  - name: node
    count: 2
    address: 10.0.0.1{}
    interface: ib0
    devices: [{type: 910B3, count: 8}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with plan.json and cluster.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(live, "engine_python", lambda: None)
    TWO.plan().save("plan.json")
    Path("cluster.yaml").write_text(CLUSTER)
    return tmp_path


def _run(*argv: str) -> str:
    done = CliRunner().invoke(app, ["plan", *argv])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_render_says_what_it_wrote_and_what_comes_next(folder: Path) -> None:
    said = _run("render", "plan.json", "-m", "/models/glm", "-o", "out", "-c", "cluster.yaml")
    assert "out: 1 engine on 2 nodes" in said
    assert "wrote shell/node-1.sh" in said
    assert "no ray: form 'ray'" in said
    assert "the checkpoint is not here, so preflight.sh only tells its hash" in said
    assert said.endswith("next: transload plan check out")
    assert "HOST_IP:-10.0.0.11" in (folder / "out/shell/node-1.sh").read_text()
    assert "INTERFACE:-ib0" in (folder / "out/shell/node-1.sh").read_text()
    assert "11 files unchanged" in _run("render", "plan.json", "-m", "/models/glm", "-o", "out", "-c", "cluster.yaml")


def test_a_checkpoint_that_is_here_is_fingerprinted_and_read_for_its_format(folder: Path) -> None:
    checkpoint = folder / "glm"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(model("GLM-5")))
    said = _run("render", "plan.json", "-m", str(checkpoint), "-o", "out", "-f", "shell", "--hash", "full")
    assert "wrote checkpoint-ascend.sha256" in said
    assert "only tells its hash" not in said
    assert "--quantization" not in (folder / "out/shell/node-0.sh").read_text()  # no msModelSlim description beside it
    (checkpoint / "quant_model_description.json").write_text("{}")
    _run("render", "plan.json", "-m", str(checkpoint), "-o", "out", "-f", "shell", "--force")
    assert "--quantization ascend" in (folder / "out/shell/node-0.sh").read_text()


def test_arguments_variables_and_images_are_passed_on(folder: Path) -> None:
    _run(
        "render", "plan.json", "-m", "/m", "-o", "out", "-f", "compose",
        "--arguments", "--seed 7 --chat-template 'a b'", "--env", "A=b=c", "--image", "ascend=mine:1", "--port", "9000",
        "--additional-config", '{"weight_nz_mode": 2}',
    )  # fmt: skip
    text = (folder / "out/compose/node-0.yaml").read_text()
    for part in (
        "image: mine:1",
        "A: b=c",
        "--seed=7",
        "--chat-template=a b",
        "--port=9000",
        'config={"weight_nz_mode": 2}',
    ):
        assert part in text


def test_an_argument_that_the_release_does_not_know_is_doubted_at_once(folder: Path) -> None:
    said = _run("render", "plan.json", "-m", "/m", "-o", "out", "-f", "shell", "--arguments", "--max-modle-len 8k")
    assert said.count("careful: --max-modle-len: vLLM 0.23.0 has no such option; nearest is --max-model-len") == 1


def test_check_counts_what_passed_and_lists_the_rest(folder: Path) -> None:
    _run("render", "plan.json", "-m", "/models/glm", "-o", "out")
    said = _run("check", "out")
    assert re.search(r"ok 2 x flags of vLLM 0\.23\.0 .* good$", said)
    path = folder / "out/compose/node-0.yaml"
    path.write_text(path.read_text().replace("ipc: host", "ipcs: host"))
    done = CliRunner().invoke(app, ["plan", "check", "out"])
    assert done.exit_code == 2
    assert "bad compose/node-0.yaml (compose schema)" in " ".join(done.output.split())
    found = json.loads(CliRunner().invoke(app, ["plan", "check", "out", "--json"]).output)
    assert ("compose/node-0.yaml", "launch.json", "note") in [(f["subject"], f["by"], f["state"]) for f in found]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["-f", "helm"], "format 'helm' is not known; there are shell, systemd, ray, compose, kubernetes"),
        (["-f", "ray"], "format 'ray' cannot start this plan"),
        (["--engine", "vllm==0.32"], "engine vllm==0.32: the plan was made for vllm-ascend==0.23"),
        (["--form", "slurm"], "form 'slurm': expected one of auto, native, dp, ray"),
        (["--arguments", "'open"], "--arguments: No closing quotation"),
        (["--env", "no-value"], "--env no-value: expected NAME=VALUE"),
        (["--hash", "md5"], "--hash md5: expected edges, full or none"),
        (["--additional-config", "{"], "additional config: not valid JSON"),
        (["-m", "ascend=/a"], "give one for all, or one for each of cuda, ascend, cpu"),
        (["--port", "99999"], "port 99999: expected 1 to 65535"),
        (["-o", "/proc/out"], "/proc: cannot be written"),
        (["-c", "one.yaml"], "does not have node-1; it has 1: node-0; plan again for this cluster"),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_wrong_questions_are_answered_before_anything_is_written(argv: list[str], said: str, folder: Path) -> None:
    Path("one.yaml").write_text("nodes: [{name: node-0, devices: [{type: 910B3, count: 8}]}]")
    before = sorted(folder.rglob("*"))
    with pytest.raises(TransloadError) as error:
        _run("render", "plan.json", "-m", "/m", "-o", "out", *argv)
    assert said in str(error.value)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "plan.json: not a plan written by `transload plan --save`"),
        ('{"model": "x"}', "Field required"),
        ("\udcff".encode("utf-8", "surrogateescape").decode("latin-1"), "not a plan"),
    ],
)
def test_files_that_are_no_plans(text: str, said: str, folder: Path) -> None:
    Path("plan.json").write_text(text)
    with pytest.raises(TransloadError, match=re.escape(said)):
        _run("render", "plan.json", "-m", "/m", "-o", "out")


def test_a_plan_that_does_not_fit_is_not_rendered(folder: Path) -> None:
    TWO.plan().model_copy(update={"fits": False, "reason": "too small"}).save("plan.json")
    with pytest.raises(TransloadError, match="GLM-5 on cluster: too small"):
        _run("render", "plan.json", "-m", "/m", "-o", "out")
