"""The command: `plan MODEL`, `plan init`, `plan calibrate`; pictures; device maps."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from plan.models import CONFIGS, config
from transload.errors import DoesNotFit, OutputExists
from transload.plan import cli
from transload.plan.discover import match
from transload.plan.picture import plan_html, plan_svg
from transload.plan.planner import plan

RUN = CliRunner()
QWEN = str(CONFIGS / "Qwen3-8B.json")


def test_a_model_needs_no_sub_command_and_json_has_what_is_promised() -> None:
    result = RUN.invoke(cli.app, [QWEN, "--cluster", "2xH100", "--context", "16k", "--concurrency", "4", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    assert {"fits", "reason", "parallelism", "ranks", "kv_tokens", "max_concurrency"} <= set(data)
    assert {"tp", "pp", "dp", "ep"} <= set(data["parallelism"])
    ranks = {"node", "device", "weights_bytes", "kv_bytes", "activation_bytes", "overhead_bytes", "free_bytes"}
    assert ranks <= set(data["ranks"][0])


def test_options_may_come_before_the_model_and_fix_the_shape() -> None:
    result = RUN.invoke(cli.app, ["--cluster", "8xH100", "--tp", "4", "--dp", "1", "--json", QWEN])
    assert json.loads(result.output)["parallelism"]["tp"] == 4


def test_no_fit_has_exit_code_two_and_says_what_would_help() -> None:
    arguments = [str(CONFIGS / "Qwen2.5-72B.json"), "-c", "8xH100", "--recipe", "int4-g128", "--tp", "8"]
    result = RUN.invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert "28.875 groups of 128" in " ".join(result.output.split())
    assert "What would make it fit" in result.output


def test_a_fit_is_a_table_with_a_ledger() -> None:
    result = RUN.invoke(cli.app, [str(CONFIGS / "GLM-4.6.json"), "-c", "8xH100", "--recipe", "int4-g128-experts"])
    assert result.exit_code == 0
    for word in ("fits as", "routed experts", "KV cache", "exact", "estimated", "Pareto"):
        assert word in result.output


def test_init_writes_a_cluster_file_that_plans(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    assert RUN.invoke(cli.app, ["init", str(file)]).exit_code == 0
    assert "# A cluster" in file.read_text()
    assert RUN.invoke(cli.app, [QWEN, "--cluster", str(file), "--context", "1k", "--json"]).exit_code in (0, 2)
    again = RUN.invoke(cli.app, ["init", str(file)])
    assert isinstance(again.exception, OutputExists)


def test_reported_names_find_their_catalogue_entry() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA A100-SXM4-80GB": "A100-80GB",
        "NVIDIA GeForce RTX 4090": "RTX-4090",
        "Tesla T4": "T4",
        "NVIDIA L40S": "L40S",
        "910B3": "Ascend-910B3",
    }
    for reported, expected in names.items():
        found = match(reported)
        assert found is not None
        assert found.name == expected
    assert match("Radeon VII") is None


def test_pictures_are_well_formed_and_name_every_device() -> None:
    answer = plan(config("GLM-5"), "2x16xA3", {"context": "32k"}, recipe="w4a8")
    root = ElementTree.fromstring(plan_svg(answer))
    titles = [e.text or "" for e in root.iter("{http://www.w3.org/2000/svg}title")]
    assert sum("weights" in t for t in titles) == len(answer.ranks)
    assert "<svg" in plan_html(answer)
    bad = plan(config("GLM-5"), "1xT4", {"context": "32k"}, recipe="bf16")
    assert "does not fit" in plan_svg(bad)


def test_names_in_pictures_are_escaped() -> None:
    entry = {"type": "<script>", "platform": "cuda", "memory": "80 GB"}
    answer = plan(config("Qwen3-8B"), {"name": "<b>", "nodes": [{"name": "n", "devices": [entry]}]})
    ElementTree.fromstring(plan_svg(answer))
    assert "<script>" not in plan_html(answer)


def test_a_device_map_covers_every_module_once_in_order() -> None:
    answer = plan(config("Qwen3-8B"), "2xT4", {"context": 8192})
    mapped = answer.device_map()
    assert list(mapped) == ["model.embed_tokens", *(f"model.layers.{i}" for i in range(36)), "model.norm", "lm_head"]
    assert set(mapped.values()) == {0, 1}
    sizes = {m.name: m.size + m.cache for m in answer.modules}
    for room in answer.rooms:
        assert sum(sizes[m] for m, d in mapped.items() if d == room.device) <= room.size


def test_a_device_map_offloads_to_ram_and_disk() -> None:
    node = {"name": "n", "devices": [{"type": "T4"}], "host_memory": "2 GiB", "disk": "100 GiB"}
    mapped = plan(config("Qwen3-8B"), {"nodes": [node]}, {"context": 2048}).device_map()
    places = list(mapped.values())
    assert places[0] == 0
    assert places == sorted(places, key=[0, "cpu", "disk"].index)
    assert set(places) == {0, "cpu", "disk"}
    bare = plan(config("Qwen3-8B"), {"nodes": [{"name": "n", "devices": [{"type": "T4"}]}]}, {"context": 2048})
    with pytest.raises(DoesNotFit, match="raise host_memory or disk"):
        bare.device_map()


def test_the_package_can_be_called_and_needs_no_torch() -> None:
    code = (
        "import sys, json, transload.plan as p; "
        f"r = p(json.load(open({QWEN!r})), '1xH100'); "
        "assert r.fits; r.require(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
