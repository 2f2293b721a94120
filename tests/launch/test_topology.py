"""Which form an instance starts in, and plans, sites and names that contradict themselves."""

from __future__ import annotations

from typing import Any

import pytest

import transload
from launch.plans import CASES, addresses, model
from transload.errors import ConfigError, DoesNotFit
from transload.launch import EngineCommand, Site, commands
from transload.launch.topology import instances
from transload.plan.cluster import load_cluster
from transload.plan.result import Plan

BY_ID = {case.id: case for case in CASES}
PIPELINE = BY_ID["Qwen3-235B-A22B-2x8xH100-bf16-tp8-pp2"].plan()
DP = BY_ID["DeepSeek-V3-2x8xH200-fp8-tp8-dp2-ep1"].plan()
ONE = BY_ID["Qwen3-8B-1xH100-bf16"].plan()


def _flag(command: EngineCommand, name: str) -> str | None:
    return command.argv[command.argv.index(name) + 1] if name in command.argv else None


def test_native_form_numbers_the_nodes() -> None:
    head, worker = commands(PIPELINE, "/m", site=addresses(2))
    assert [(_flag(c, "--nnodes"), _flag(c, "--node-rank")) for c in (head, worker)] == [("2", "0"), ("2", "1")]
    assert {_flag(c, "--master-addr") for c in (head, worker)} == {"10.0.0.1"}
    assert "--headless" in worker.argv
    assert "--headless" not in head.argv
    assert (head.role, worker.role) == ("head", "worker")
    assert head.health_url == worker.health_url == "http://10.0.0.1:8000/health"
    assert worker.env["VLLM_HOST_IP"] == "10.0.0.2"
    assert worker.env["NCCL_SOCKET_IFNAME"] == "eth0"


def test_dp_form_gives_a_start_rank_to_headless_nodes_only() -> None:
    head, worker = commands(DP, "/m", site=addresses(2))
    assert "--nnodes" not in head.argv
    assert _flag(head, "--data-parallel-size-local") == _flag(worker, "--data-parallel-size-local") == "1"
    assert _flag(head, "--data-parallel-start-rank") is None
    assert _flag(worker, "--data-parallel-start-rank") == "1"
    assert _flag(worker, "--data-parallel-address") == "10.0.0.1"


def test_ray_starts_a_cluster_of_its_own() -> None:
    head, worker = commands(PIPELINE, "/m", site=Site(form="ray", addresses=addresses(2).addresses))
    assert head.setup[0][:3] == ("ray", "start", "--head")
    assert worker.argv[:4] == ("ray", "start", "--address", "10.0.0.1:6379")
    assert worker.argv[-1] == "--block"
    assert _flag(head, "--distributed-executor-backend") == "ray"
    assert "--nnodes" not in head.argv
    assert head.env["RAY_ADDRESS"] == "10.0.0.1:6379"


def test_node_names_stand_in_for_addresses_that_nobody_gave() -> None:
    head, worker = commands(PIPELINE, "/m")
    assert head.head_address == "node-0"
    assert "VLLM_HOST_IP" not in worker.env
    assert "GLOO_SOCKET_IFNAME" not in worker.env


def test_an_ipv6_address_is_bracketed_in_urls() -> None:
    head = commands(PIPELINE, "/m", site=Site(addresses={"node-0": "fd00::1"}))[0]
    assert head.health_url == "http://[fd00::1]:8000/health"


def _changed(plan: Plan, **rank: Any) -> Plan:
    """The plan with its last rank changed."""
    return plan.model_copy(update={"ranks": (*plan.ranks[:-1], plan.ranks[-1].model_copy(update=rank))})


@pytest.mark.parametrize(
    ("plan", "form", "said"),
    [
        (PIPELINE, "dp", "form 'dp': a data-parallel rank of TP 8 x PP 2 x DP 1 on H100 spans nodes"),
        (DP, "ray", "would hang"),
        (_changed(PIPELINE, node="node-0", device=8), "native", "found 9 on node-0, 7 on node-1; use ray"),
        (_changed(PIPELINE, rank=99), "auto", "needs ranks 0 to 15"),
        (PIPELINE.model_copy(update={"ranks": PIPELINE.ranks[:-1]}), "auto", "has 15 ranks"),
        (_changed(PIPELINE, node="node-0", device=0), "auto", "puts two ranks on device 0 of node-0"),
        (_changed(PIPELINE, replica=5), "auto", "has 15 ranks"),
        (_changed(ONE, deployment=3), "auto", "has 0 ranks"),
        (_changed(ONE, node="../../etc"), "auto", "'../../etc' is no name for a node"),
        (_changed(ONE, node="a\nb"), "auto", "is no name for a node"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_plans_that_contradict_themselves_or_the_form(plan: Plan, form: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        instances(plan, form)
    assert said in str(error.value)


def test_unequal_nodes_start_over_ray() -> None:
    assert instances(_changed(PIPELINE, node="node-0", device=8))[0].shape == "ray"


def test_a_plan_that_does_not_fit_is_not_launched() -> None:
    plan = transload.plan(model("DeepSeek-V3"), "1xL4")
    with pytest.raises(DoesNotFit, match="short before any KV cache"):
        commands(plan, "/m")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("0.23", "engine 0.23: the plan was made for vllm==0.32"),
        ("vllm-ascend==0.23", "the plan was made for vllm==0.32"),
        ("vlm==0.32", "engine 'vlm==0.32' is not known; nearest: vllm==0.32"),
    ],
)
def test_an_engine_of_another_release(wanted: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        commands(ONE, "/m", wanted)
    assert commands(ONE, "/m", "vllm==0.32") == commands(ONE, "/m", "0.32.1") == commands(ONE, "/m")


@pytest.mark.parametrize(
    ("path", "site", "said"),
    [
        ("", {}, "no checkpoint is given for cuda"),
        ("--trust-remote-code", {}, "would not take it as a model path"),
        ("/m\0", {}, "would not take it as a model path"),
        ("/m", {"served_name": "-x"}, "would not take it as a model name"),
    ],
)
def test_arguments_that_an_engine_would_misread(path: str, site: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        commands(ONE, path, site=Site(**site))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ({"addresses": {"node": "10.0.0.1; rm -rf /"}}, "address of node node"),
        ({"interfaces": {"node": "eth0\nx"}}, "interface of node node"),
        ({"port": 0}, "port 0: expected 1 to 65535"),
        ({"form": "slurm"}, "form 'slurm': expected one of auto, native, dp, ray"),
        ({"directory": "relative"}, "expected an absolute path"),
        ({"directory": "/a b"}, "expected an absolute path without blanks"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_sites_that_cannot_be(site: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Site(**site)


def test_a_cluster_file_gives_addresses_and_must_have_the_plan_s_nodes() -> None:
    data = {
        "nodes": [
            {"name": "node", "count": 2, "address": "10.1.0.1{}", "interface": "ib0", "devices": [{"type": "H100"}]}
        ]
    }
    site = Site.of(load_cluster(data))
    assert dict(site.addresses) == {"node-0": "10.1.0.10", "node-1": "10.1.0.11"}
    assert set(site.interfaces.values()) == {"ib0"}
    assert len(commands(PIPELINE, "/m", site=site)) == 2
    data["nodes"][0]["count"] = 1
    with pytest.raises(ConfigError, match="does not have node-0, node-1; it has 1: node; plan again"):
        commands(PIPELINE, "/m", site=Site.of(load_cluster(data)))
    data["nodes"][0] |= {"count": 2, "address": "10.1.0.1"}
    with pytest.raises(ConfigError, match=r"2 nodes cannot share the address 10\.1\.0\.1; write \{\}"):
        Site.of(load_cluster(data))
