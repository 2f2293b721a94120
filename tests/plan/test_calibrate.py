"""Calibration: constants read from engines' logs, and plans that change by what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from plan.models import config
from transload.errors import ConfigError
from transload.plan import cli
from transload.plan.calibrate import calibrated, load_constants, read_log, write_constants
from transload.plan.planner import plan

RUN = CliRunner()
GIB = 1 << 30
REAL_CPU = Path(__file__).parents[1] / "golden" / "plan" / "logs" / "vllm-cpu-0.32.log"

# In the words of vLLM 0.32 (v1/worker/gpu_worker.py, gpu_model_runner.py).
CUDA = """\
INFO 11-22 05:00:00 [gpu_model_runner.py:5150] Model loading took 28.71 GiB memory and 61.2 seconds
INFO 11-22 05:00:31 [gpu_worker.py:760] Available KV cache memory: 41.02 GiB
INFO 11-22 05:00:31 [kv_cache_utils.py:2328] GPU KV cache size: 915,200 tokens, Maximum concurrency ...
INFO 11-22 05:00:55 [gpu_model_runner.py:6582] Graph capturing finished in 20 secs, took 0.83 GiB
INFO 11-22 05:00:55 [gpu_worker.py:1034] Free memory on device (78.6/79.18 GiB) on startup. Desired GPU memory \
utilization is (0.92, 72.85 GiB). Actual usage is 29.42 GiB for consumed memory (weights + non-torch), 1.55 GiB for \
peak activation, and 0.83 GiB for CUDAGraph memory. Replace gpu_memory_utilization ...
"""
# In the words of vllm-ascend 0.23 (worker/worker.py, model_runner_v1.py).
ASCEND = """\
INFO 11-22 05:00:00 [model_runner_v1.py:3794] Loading model weights took 45.6321 GB
INFO 11-22 05:00:31 [worker.py:594] Available KV cache memory: 6.41 GiB
INFO 11-22 05:00:55 [worker.py:768] Free memory on device (60.7/60.96 GiB) on startup. Desired GPU memory \
utilization is (0.95, 57.91 GiB). Actual usage: 45.63 GiB for weights, 3.11 GiB for peak activation, 2.76 GiB for \
non-torch memory, 0.94 GiB for NPU graph memory. Replace gpu_memory_utilization with ...
"""


def _log(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "engine.log").write_text(text)
    return folder / "engine.log"


def _calibrated(log: Path, out: Path, platform: str) -> str:
    result = RUN.invoke(cli.app, ["calibrate", str(log), "--out", str(out), "--platform", platform])
    assert result.exit_code == 0, result.output
    return result.output


def test_calibration_replaces_estimates_by_measurements(tmp_path: Path) -> None:
    log, out = _log(tmp_path, CUDA), tmp_path / "constants.yaml"
    assert "graphs_base: 0.830 GiB" in _calibrated(log, out, "cuda")
    measured = plan(config("Qwen3-8B"), "1xH100", {"context": "8k"}, constants=load_constants(out))
    lines = {line.name: line for line in measured.deployments[0].stages[0].lines}
    assert lines["captured graphs"].kind == "measured"
    assert lines["activation peak"].size == round(1.55 * GIB)
    assert lines["driver context"].size == pytest.approx(0.71 * GIB, rel=1e-3)
    rows = yaml.safe_load(write_constants(calibrated([read_log(log)], "cuda")))
    assert rows["cuda"]["graphs_base"]["kind"] == "measured"


def test_an_ascend_log_replaces_the_lines_of_a_die(tmp_path: Path) -> None:
    out = tmp_path / "constants.yaml"
    _calibrated(_log(tmp_path, ASCEND), out, "ascend")
    question = (config("GLM-5"), "16xA3", {"context": "32k"})
    shape = {"recipe": "w4a8", "tp": 16, "dp": 1, "pp": 1, "ep": True}
    before = plan(*question, **shape).deployments[0].stages[0]
    after = plan(*question, **shape, constants=load_constants(out)).deployments[0].stages[0]
    lines = {line.name: line for line in after.lines}
    assert lines["driver context"].size == pytest.approx(2.76 * GIB, rel=1e-3)
    assert lines["activation peak"].size == pytest.approx(3.11 * GIB, rel=1e-3)
    assert lines["captured graphs"].size == pytest.approx(0.94 * GIB, rel=1e-3)
    assert {line.kind for line in after.lines if line.group in ("activation", "overhead")} <= {"measured", "estimated"}

    def beside(stage) -> int:
        return sum(line.size for line in stage.lines if line.group in ("activation", "overhead"))

    assert after.available - before.available == beside(before) - beside(after)


def test_a_real_log_of_a_cpu_start_is_read_and_used(tmp_path: Path) -> None:
    read = read_log(REAL_CPU)
    assert (read.not_cache, read.checkpoint, read.tokens) == (2.01, 0.70, 341_248)
    out = tmp_path / "constants.yaml"
    assert "context: 1.310 GiB" in _calibrated(REAL_CPU, out, "cpu")
    cluster = {"nodes": [{"name": "n", "devices": [{"type": "CPU", "memory": "19.71 GiB"}]}]}
    question = (config("Qwen3-8B"), cluster, {"context": 1024, "concurrency": 1})
    shape = {"recipe": "int4-g32", "gpu_memory_utilization": 0.95}
    before = plan(*question, **shape)
    after = plan(*question, **shape, constants=load_constants(out))
    line = next(x for x in after.deployments[0].stages[0].lines if x.name == "driver context")
    assert (line.kind, line.size) == ("measured", round(1.31 * GIB))
    lost = before.deployments[0].stages[0].available - after.deployments[0].stages[0].available
    assert lost == round(1.31 * GIB) - GIB
    assert after.kv_tokens < before.kv_tokens


def test_several_logs_count_by_the_largest_value(tmp_path: Path) -> None:
    logs = [read_log(_log(tmp_path / part, CUDA.replace("took 0.83", f"took {part}"))) for part in ("0.95", "0.83")]
    rows = calibrated(logs, "cuda")["cuda"]
    assert str(rows["graphs_base"].value).startswith("0.95")


def test_a_log_without_measurements_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no line of an engine's start"):
        read_log(_log(tmp_path, "hello\n"))
