"""`check` finds what is wrong in a rendered folder, tool by tool, and says what it did not check."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from launch.plans import CASES
from transload.errors import ConfigError
from transload.launch import EngineCommand, Site, live, validators
from transload.launch.check import Finding, check, check_files, passed
from transload.launch.live import Verdict
from transload.launch.manifest import FILE, Manifest
from transload.launch.render import render
from transload.launch.write import write

BY_ID = {case.id: case for case in CASES}
TWO = BY_ID["GLM-5-2x8x910B3-w4a8-tp8-dp2-ep1"]
VENDORS = BY_ID["GLM-4.6-two-vendors-cuda=int4-g64-experts,ascend=w4a8-tp8-ep1"]


@pytest.fixture(autouse=True)
def _without_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "engine_python", lambda: None)


def _rendered(folder: Path, case: str = TWO.id, **site: object) -> Path:
    write(render(BY_ID[case].plan(), "/m", site=Site(**site)).files, folder)  # type: ignore[arg-type]
    return folder


def _bad(folder: Path) -> list[Finding]:
    return [f for f in check(folder) if f.state == "bad"]


def test_a_fresh_folder_is_good_and_what_was_not_checked_is_said(tmp_path: Path) -> None:
    findings = check(_rendered(tmp_path))
    assert passed(findings)
    assert [f.text for f in findings if f.by == "vLLM's parser"] == [
        "no vllm on PATH; TRANSLOAD_VLLM_PYTHON may name its python"
    ]


@pytest.mark.parametrize(
    ("name", "old", "new", "by", "said"),
    [
        ("shell/node-0.sh", "engine_0() {", "engine_0( {", "bash, shellcheck", "syntax error"),
        ("shell/node-0.sh", '"$HOST_IP"', "$HOST_IP", "bash, shellcheck", "Double quote to prevent globbing"),
        ("compose/node-0.yaml", "restart: unless", "restarts: unless", "compose schema", "'restarts' does not match"),
        ("compose/node-0.yaml", "network_mode: host", "network_mode: [host]", "compose schema", "network_mode"),
        ("compose/node-1.yaml", "services:", "services: {", "compose schema", "not valid YAML"),
        ("kubernetes/engine-0.yaml", "size: 2", "size: two", "kubernetes schemas", "'two' is not of type 'integer'"),
        ("kubernetes/engine-0.yaml", "startupPolicy:", "startPolicy:", "kubernetes schemas", "'startPolicy'"),
        ("kubernetes/engine-0.yaml", "containerPort:", "containrPort:", "kubernetes schemas", "'containerPort' is"),
        ("systemd/node-0/transload-engine-0.service", "Type=exec", "Type=exce", "systemd-analyze", "service type"),
        ("systemd/node-0/transload-engine-0.service", "node-0.sh", "node-9.sh", "systemd-analyze", "not executable"),
    ],
    ids=lambda v: v[:40],
)  # fmt: skip
def test_a_mistake_in_a_file_is_found_by_its_reader(
    name: str, old: str, new: str, by: str, said: str, tmp_path: Path
) -> None:
    if by == "systemd-analyze" and shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    path = _rendered(tmp_path) / name
    path.write_text(path.read_text().replace(old, new))
    found = [f for f in check_files(tmp_path, [name]) if f.state != "note"]
    assert found
    assert {f.state for f in found} == {"bad"}
    assert {f.by for f in found} == {by}
    assert any(said in f.text for f in found), found


def test_a_mistake_in_the_router_is_found_by_nginx(tmp_path: Path) -> None:
    if isinstance(validators.nginx(_rendered(tmp_path, VENDORS.id) / "router/nginx.conf"), validators.Skipped):
        pytest.skip("nginx is not installed")
    assert validators.nginx(tmp_path / "router/nginx.conf") == []
    path = tmp_path / "router/nginx.conf"
    path.write_text(path.read_text().replace("least_conn;", "least_con;"))
    assert 'unknown directive "least_con"' in check_files(tmp_path, ["router/nginx.conf"])[0].text


def test_a_key_that_vllm_ascend_would_ignore_is_bad(tmp_path: Path) -> None:
    found = _bad(_rendered(tmp_path, additional_config={"enable_shared_expert_pd": True}))
    assert {f.subject for f in found} == {"engine-0", "engine-0-worker-node-1"}
    assert "reads no key 'enable_shared_expert_pd'; nearest is enable_shared_expert_dp" in found[0].text


def test_an_argument_that_the_release_does_not_have_is_bad(tmp_path: Path) -> None:
    found = _bad(_rendered(tmp_path, arguments=("--max-modle-len", "8k")))
    assert "--max-modle-len: vLLM 0.23.0 has no such option; nearest is --max-model-len" in found[0].text


def test_an_edited_file_is_worth_a_note(tmp_path: Path) -> None:
    with (_rendered(tmp_path) / "README.md").open("a") as f:
        f.write("mine")
    findings = check(tmp_path)
    assert (
        Finding(
            "README.md",
            "launch.json",
            "note",
            "was edited since it was rendered; commands are judged as launch.json has them",
        )
        in findings
    )
    assert passed(findings)


def test_a_missing_file_is_bad(tmp_path: Path) -> None:
    (_rendered(tmp_path) / "preflight.sh").unlink()
    assert _bad(tmp_path) == [Finding("preflight.sh", "launch.json", "bad", "was rendered and is not there")]


def test_folders_that_hold_no_rendering(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"launch\.json: No such file or directory; write it with: transload plan render"
    ):
        check(tmp_path)
    _rendered(tmp_path)
    plan = tmp_path / "plan.json"
    plan.write_text(plan.read_text().replace('"model": "GLM-5"', '"model": "GLM-6"'))
    with pytest.raises(ConfigError, match=r"plan\.json: is not the plan that launch\.json was rendered from"):
        check(tmp_path)
    for text, said in (("{", "Invalid JSON"), ('{"version": 1}', "Field required"), ("[]", "should be an object")):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ConfigError, match=f"{FILE}.*{said}.*render the plan again"):
            check(tmp_path)


def test_a_manifest_that_names_files_outside_is_not_followed(tmp_path: Path) -> None:
    data = json.loads((_rendered(tmp_path / "out") / FILE).read_text())
    (tmp_path / "secret.sh").write_text("if")
    data["files"]["../secret.sh"] = "0" * 64
    (tmp_path / "out" / FILE).write_text(Manifest.model_validate(data).to_json())
    assert _bad(tmp_path / "out") == [Finding("../secret.sh", "launch.json", "bad", "was rendered and is not there")]


def test_a_manifest_of_other_engines_is_refused(tmp_path: Path) -> None:
    data = json.loads((_rendered(tmp_path) / FILE).read_text())
    data["processes"][0]["deployment"] = 7
    (tmp_path / FILE).write_text(Manifest.model_validate(data).to_json())
    with pytest.raises(ConfigError, match=r"launch\.json has other engines than plan\.json"):
        check(tmp_path)


def test_nodes_are_found_by_name_and_number(tmp_path: Path) -> None:
    manifest = Manifest.model_validate_json((_rendered(tmp_path) / FILE).read_text())
    assert manifest.on_node(1) == manifest.on_node("1") == manifest.on_node("node-1")
    for wrong in (2, -1, "node-2", "7"):
        with pytest.raises(ConfigError, match=r"the plan has 2 nodes: 0 \(node-0\), 1 \(node-1\)"):
            manifest.on_node(wrong)


@pytest.mark.parametrize(
    ("version", "verdict", "states"),
    [
        ("0.23.1", Verdict(None, None, {"world_size": 8, "local_world_size": 8, "layers": 78}), ["ok", "ok"]),
        ("0.23.1", Verdict("unrecognized arguments: --x", None, None), ["bad"]),
        ("0.23.1", Verdict(None, "64 heads must be divisible", None), ["ok", "bad"]),
        ("0.32.0", Verdict("unrecognized arguments: --x", None, None), ["note"]),
        ("0.32.0", Verdict(None, "64 heads must be divisible", None), ["ok", "note"]),
    ],
    ids=["good", "parser", "configuration", "parser of another release", "configuration of another release"],
)
def test_an_engine_s_verdict_counts_when_it_is_the_planned_release(
    version: str, verdict: Verdict, states: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def judge(
        python: str, commands: Sequence[EngineCommand], folders: Sequence[str | None]
    ) -> tuple[str, list[Verdict]]:
        asked.extend(folders)
        return version, [verdict] * len(commands)

    monkeypatch.setattr(live, "judge", judge)
    (tmp_path / "config.json").write_text("{}")
    findings = check(_rendered(tmp_path / "out"), config=tmp_path / "config.json", python="python-of-vllm")
    mine = [f for f in findings if f.subject == "engine-0" and f"vLLM {version}" in f.by]
    assert [f.state for f in mine] == states
    assert asked == [str(tmp_path)] * 2
