"""Rendered text: deterministic, complete, and the same command in every format, hostile names included."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.plans import CASES, Case
from transload.errors import ConfigError
from transload.launch import EngineCommand, Site, commands
from transload.launch.render import FORMATS, Rendered, render
from transload.launch.router import weights
from transload.launch.topology import instances
from transload.launch.write import write
from transload.plan.result import Plan

HOSTILE = "/models/it's $HOME `id` $(id) \"x\" $$y %n\n# and 'more' \\"
NAME = 'served "name" $(id) $$ é'
BY_ID = {case.id: case for case in CASES}
ONE, TWO, DP, ASCEND, CPU, VENDORS = (
    BY_ID[name]
    for name in (
        "Qwen3-235B-A22B-8xH100-int4-g128-tp8-ep1",
        "Qwen3-235B-A22B-2x8xH100-bf16-tp8-pp2",
        "DeepSeek-V3-2x8xH200-fp8-tp8-dp2-ep1",
        "GLM-5-2x8x910B3-w4a8-tp8-dp2-ep1",
        "Qwen2.5-0.5B-1xCPU-bf16",
        "GLM-4.6-two-vendors-cuda=int4-g64-experts,ascend=w4a8-tp8-ep1",
    )
)
SHOWN = (ONE, TWO, DP, ASCEND, CPU, VENDORS)


def _rendered(case: Case, path: str = "/models/m", **site: Any) -> Rendered:
    known = {"addresses": case.site.addresses, "interfaces": case.site.interfaces, "form": case.site.form}
    return render(case.plan(), path, site=Site(**{**known, **site}))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_every_plan_renders_the_same_text_twice(case: Case) -> None:
    first, second = (dict(_rendered(case).files) for _ in range(2))
    assert first == second
    assert {"launch.json", "plan.json", "README.md", "preflight.sh"} <= set(first)
    for name, text in first.items():
        assert text.endswith("\n"), name
        assert not re.search(r"[ \t]+$", text, re.MULTILINE), f"{name} has blanks at the end of a line"
        assert "/root" not in text


@pytest.mark.parametrize("case", SHOWN, ids=lambda c: c.id)
def test_scripts_start_exactly_the_command(case: Case, tmp_path: Path) -> None:
    """Scripts run with a vllm that writes its arguments and variables down."""
    made = _rendered(case, HOSTILE, served_name=NAME, env={"EXTRA": "a 'b' $c\nd"})
    write(made.files, tmp_path)
    fake = tmp_path / "bin" / "vllm"
    fake.parent.mkdir()
    fake.write_text('#!/usr/bin/env bash\nprintf "%s\\0" "$@" > "$SAID"\nenv -0 > "$SAID.env"\n')
    fake.chmod(0o755)
    for command in made.manifest.commands():
        said = tmp_path / f"{command.name}.said"
        script = tmp_path / "shell" / f"{command.node}.sh"
        env = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "SAID": str(said), "INTERFACE": "eth0"}
        subprocess.run([str(script)], env=env, check=True, timeout=60)
        assert said.read_text(encoding="utf-8").split("\0")[:-1] == list(command.argv[1:])
        variables = dict(row.split("=", 1) for row in Path(f"{said}.env").read_text().split("\0") if "=" in row)
        assert {name: variables.get(name) for name in command.env} == dict(command.env)


@pytest.mark.parametrize("case", SHOWN, ids=lambda c: c.id)
def test_compose_services_start_exactly_the_command(case: Case) -> None:
    made = _rendered(case, HOSTILE, served_name=NAME)
    for command in made.manifest.commands():
        services = yaml.safe_load(made.files[f"compose/{command.node}.yaml"])["services"]
        service = services[command.name.replace("_", "-")]
        words = [*service["entrypoint"], *(_undollar(word) for word in service["command"])]
        assert _split_options(words) == _split_options(list(command.argv))
        assert _undollar(service["volumes"][0]["source"]) == HOSTILE
        assert ("healthcheck" in service) == (command.role == "head")


@pytest.mark.parametrize("case", SHOWN, ids=lambda c: c.id)
def test_pods_start_the_command_with_kubernetes_own_addresses(case: Case) -> None:
    made = _rendered(case, HOSTILE, served_name=NAME)
    heads = [c for c in made.manifest.commands() if c.role == "head"]
    workers = [c for c in made.manifest.commands() if c.role == "worker"]
    pods = [pod for name, text in made.files.items() if "kubernetes/engine" in name for pod in _pods(text)]
    assert len(pods) == len(heads) + min(1, len(workers))
    for pod, command in zip(pods, [*heads, *workers], strict=False):
        container = pod["containers"][0]
        words = [_expand(word) for word in (*container["command"], *container["args"])]
        if words[0] == "bash":
            env = {"PATH": os.environ["PATH"], "VLLM_HOST_IP": "10.0.0.1", "LWS_LEADER_ADDRESS": "10.0.0.1"}
            env |= {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "0" if command.role == "head" else "1"}
            echo = words[2].replace("exec vllm", "printf '%s\\0' vllm", 1)
            done = subprocess.run(["bash", "-c", echo], env=env, capture_output=True, text=True, check=True)
            words = done.stdout.split("\0")[:-1]
        wanted = _without_address(list(command.argv))
        assert _without_address(_split_options(words)) == _without_address(_split_options(wanted))


def test_settings_that_differ_from_the_engine_s_defaults_are_passed_on() -> None:
    cards = next(c for c in CASES if "unlike-cards" in c.id)
    command = commands(cards.plan(), "/m")[0]
    assert command.env["VLLM_PP_LAYER_PARTITION"] == ",".join(map(str, cards.plan().deployments[0].cuts))
    assert command.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert command.env["CUDA_VISIBLE_DEVICES"] == ",".join(str(r.device) for r in cards.plan().ranks)
    mtp = next(c for c in CASES if c.tag == "mtp")
    argv = commands(mtp.plan(), "/m")[0].argv
    assert argv[argv.index("--speculative-config") + 1] == '{"method": "mtp", "num_speculative_tokens": 1}'
    text = next(c for c in CASES if c.tag == "text")
    assert {"--language-model-only", "--no-enable-prefix-caching"} <= set(commands(text.plan(), "/m")[0].argv)


def test_ascend_containers_get_their_devices_and_the_driver() -> None:
    service = yaml.safe_load(_rendered(ASCEND).files["compose/node-1.yaml"])["services"]["engine-0-worker-node-1"]
    assert [f"/dev/davinci{i}:/dev/davinci{i}" for i in range(8)] == service["devices"][:8]
    assert "/usr/local/Ascend/driver/lib64" in [v["target"] for v in service["volumes"]]
    assert service["environment"]["HCCL_INTRA_ROCE_ENABLE"] == "0"
    assert service["environment"]["HCCL_SOCKET_IFNAME"] == "eth0"


def test_two_vendors_get_one_service_each_and_weights_of_the_plan() -> None:
    made = _rendered(VENDORS)
    text = made.files["router/nginx.conf"]
    found = {m[1]: int(m[2]) for m in re.finditer(r"server (\S+) weight=(\d+)", text)}
    plan = VENDORS.plan()
    shares = [d.router_weight for d in plan.deployments]
    assert set(found) == {"nvidia:8000", "ascend:8000"} or set(found) == {"10.0.0.1:8000", "10.0.0.2:8000"}
    first, second = found.values()
    assert first / second == pytest.approx(shares[0] / shares[1], rel=0.02)
    engines = {p.argv[0] for p in made.manifest.processes}
    assert engines == {"vllm"}
    assert made.manifest.engines == tuple(d.engine for d in plan.deployments)


def test_a_checkpoint_for_each_vendor() -> None:
    paths = {"cuda": "/models/int4", "ascend": "/models/w4a8"}
    made = render(VENDORS.plan(), paths)
    for command in made.manifest.commands():
        platform = VENDORS.plan().deployments[command.deployment].platform
        assert command.argv[2] == paths[platform]
    with pytest.raises(ConfigError, match="no checkpoint is given for ascend"):
        render(VENDORS.plan(), {"cuda": "/models/int4"})


@pytest.mark.parametrize(("shares", "whole"), [((1, 1), [1, 1]), ((0.65, 0.35), [50, 27]), ((0.999, 0.001), [100, 1])])
def test_router_weights_are_whole_numbers_in_proportion(shares: tuple[float, ...], whole: list[int]) -> None:
    engines = instances(VENDORS.plan())
    made = [
        type(e)(
            e.number, e.slot, e.deployment, e.replica, e.plan.model_copy(update={"router_weight": s}), e.parts, e.shape
        )
        for e, s in zip(engines, shares, strict=True)
    ]
    assert weights(made) == whole


def test_a_second_engine_on_a_node_gets_the_next_port() -> None:
    plan = _planned_twice()
    made = render(plan, "/m")
    assert [c.port for c in made.manifest.commands()] == [8000, 8001]
    script = made.files["shell/node.sh"]
    assert "engine-0) engine_0 ;;" in script
    assert "engine-1) engine_1 ;;" in script
    assert "kill -TERM" in script


def test_a_script_of_several_engines_stops_them_all(tmp_path: Path) -> None:
    write(render(_planned_twice(), "/m").files, tmp_path)
    fake = tmp_path / "vllm"
    fake.write_text("#!/usr/bin/env bash\ntrap 'echo stopped; exit 7' TERM\necho up\nwhile :; do sleep 0.05; done\n")
    fake.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "VLLM": str(fake)}
    with subprocess.Popen([str(tmp_path / "shell/node.sh")], env=env, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert [run.stdout.readline() for _ in range(2)] == ["up\n", "up\n"]
        run.terminate()
        assert sorted(run.stdout.read().split()) == ["stopped", "stopped"]
        assert run.wait(timeout=20) == 7


def test_formats_that_cannot_start_a_plan_are_left_out_with_a_reason_or_refused() -> None:
    made = _rendered(DP)
    assert "hang" in made.left_out["ray"]
    assert "ray" not in made.manifest.formats
    with pytest.raises(ConfigError, match=r"format 'ray' cannot start this plan.*vllm#44878"):
        render(DP.plan(), "/m", formats=["ray"])
    with pytest.raises(ConfigError, match=r"format 'kubernets' is not known.*nearest: kubernetes"):
        render(DP.plan(), "/m", formats=["kubernets"])
    with pytest.raises(ConfigError, match="no format was named"):
        render(DP.plan(), "/m", formats=[])


def test_systemd_units_bring_the_scripts_that_they_start() -> None:
    made = render(ONE.plan(), "/m", formats=["systemd"], site=Site(directory="/srv/glm"))
    assert "ExecStart=/srv/glm/shell/node.sh" in made.files["systemd/node/transload-engine-0.service"]
    assert "shell/node.sh" in made.files
    assert made.manifest.formats == ("shell", "systemd")


@pytest.mark.parametrize("name", list(FORMATS))
def test_each_format_alone(name: str) -> None:
    case = TWO if name == "ray" else ONE
    assert {n.split("/")[0] for n in render(case.plan(), "/m", formats=[name]).files} >= {name}


def _planned_twice() -> Plan:
    """Two replicas on one node."""
    import transload
    from launch.plans import model

    plan = transload.plan(model("Qwen3-8B"), "2xH100", tp=1)
    assert plan.deployments[0].replicas == 2
    return plan


def _undollar(text: str) -> str:
    """What compose makes of a text without variables."""
    return text.replace("$$", "$")


def _expand(text: str) -> str:
    """What Kubernetes makes of a text when no variable of that name exists (its own expansion rules)."""
    out, i = "", 0
    while i < len(text):
        if text[i] == "$" and text[i + 1 : i + 2] == "$":
            out, i = out + "$", i + 2
        else:
            assert not re.match(r"\$\([A-Za-z_]\w*\)", text[i:]), f"an expansion is left in {text[i : i + 40]!r}"
            out, i = out + text[i], i + 1
    return out


def _split_options(words: list[str]) -> list[str]:
    """--port=8000 as two words."""
    return list(itertools.chain(*(w.split("=", 1) if re.match(r"--[a-z-]+=", w) else [w] for w in words)))


def _without_address(words: list[str]) -> list[str]:
    """Arguments without those that Kubernetes decides."""
    out = list(words)
    for option in ("--port", "--master-addr", "--data-parallel-address"):
        if option in out:
            out[out.index(option) + 1] = ""
    return out


def _pods(text: str) -> list[dict[str, Any]]:
    found = []
    for document in yaml.safe_load_all(text):
        spec = document["spec"]
        if document["kind"] == "Deployment":
            found.append(spec["template"]["spec"])
        if document["kind"] == "LeaderWorkerSet":
            found += [spec["leaderWorkerTemplate"][n]["spec"] for n in ("leaderTemplate", "workerTemplate")]
    return found


def test_commands_survive_the_manifest() -> None:
    made = _rendered(TWO, HOSTILE)
    again: tuple[EngineCommand, ...] = type(made.manifest).model_validate_json(made.files["launch.json"]).commands()
    assert again == commands(TWO.plan(), HOSTILE, site=TWO.site)
