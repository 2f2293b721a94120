"""vllm-ascend's own quantization classes take what a port writes, and make of it the numbers that were meant.

The classes come from the wheel of release 0.23.0 ($TRANSLOAD_VLLM_ASCEND_WHEEL, or what ci/ascend_sim.sh downloaded)
and run in a process that has the simulator, see vllm_ascend_judge.py.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from simulator import process

import transload
from transload.formats import find_format
from transload.quant import PER_CHANNEL, ActSpec, QTensor, QuantSpec, fuse_rows, stack_experts
from transload.reference import quantize_rtn
from transload_ascend import layouts

JUDGE = Path(__file__).parent / "vllm_ascend_judge.py"
HIDDEN, WIDTH, EXPERTS = 128, 64, 2
LAYER = "model.layers.0."
LINEARS = {f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"}
MOE = {f"mlp.experts.{e}.{n}_proj": (WIDTH, HIDDEN) for e in range(EXPERTS) for n in ("gate", "up")}
MOE |= {f"mlp.experts.{e}.down_proj": (HIDDEN, WIDTH) for e in range(EXPERTS)}
DENSE = {"mlp.gate_proj": (WIDTH, HIDDEN), "mlp.up_proj": (WIDTH, HIDDEN), "mlp.down_proj": (HIDDEN, WIDTH)}


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = process.missing()
    if reason is not None:
        pytest.skip(reason)
    named = os.environ.get("TRANSLOAD_VLLM_ASCEND_WHEEL")
    found = (
        [Path(named)] if named else sorted((process.cache_folder() / "vllm_ascend").glob("vllm_ascend-0.23.0-*.whl"))
    )
    if not found:
        pytest.skip("no wheel of vllm-ascend 0.23.0: run ci/ascend_sim.sh")
    folder = tmp_path_factory.mktemp("vllm_ascend")
    with zipfile.ZipFile(found[0]) as wheel:
        wheel.extractall(folder, [n for n in wheel.namelist() if n.startswith("vllm_ascend/quantization/")])
    return folder


def ported(tmp_path: Path, linears: dict[str, tuple[int, int]], spec: QuantSpec, requantize: str | None) -> Path:
    """A checkpoint with these quantized linears, ported for vllm-ascend 0.23."""
    generator = torch.Generator().manual_seed(1)
    tensors = {"model.norm.weight": torch.ones(HIDDEN)}
    native = find_format("compressed-tensors")
    specs = {}
    for name, shape in linears.items():
        w = quantize_rtn(torch.randn(shape, generator=generator) / 16, spec)
        tensors |= native.encode(LAYER + name, w)
        specs[LAYER + name] = spec
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 1} | native.finish(specs, {})["config.json"]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    transload.port(tmp_path / "source", tmp_path / "ported", "vllm-ascend==0.23", requantize=requantize)
    return tmp_path / "ported"


def judged(classes: Path, folder: Path) -> dict[str, torch.Tensor]:
    result = folder.parent / "made.safetensors"
    done = process.run([str(JUDGE), str(classes), str(folder), str(result)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return load_file(result)


def weights(folder: Path, *names: str) -> list[QTensor]:
    opened = transload.open(folder)
    found = [opened[LAYER + name] for name in names]
    assert all(isinstance(w, QTensor) for w in found)
    return [w for w in found if isinstance(w, QTensor)]


def test_the_classes_of_023_take_a_mixture_of_experts_and_keep_every_number(classes: Path, tmp_path: Path) -> None:
    folder = ported(tmp_path, LINEARS | MOE, QuantSpec(4, 32, scale_dtype=torch.float16), "auto")
    made = judged(classes, folder)
    for part, names in (("w13", ("gate", "up")), ("w2", ("down",))):
        experts = [fuse_rows(weights(folder, *(f"mlp.experts.{e}.{n}_proj" for n in names))) for e in range(EXPERTS)]
        meant = stack_experts(experts)
        assert torch.equal(layouts.unpack_along_n(made[f"{LAYER}mlp.{part}_weight"]), meant.codes)
        scales = layouts.scale_from_bits(made[f"{LAYER}mlp.{part}_weight_scale"])
        assert torch.equal(scales.reshape(meant.scales.shape), meant.scales)
        bias = made[f"{LAYER}mlp.{part}_scale_bias"].reshape(EXPERTS, -1)
        assert torch.allclose(bias, layouts.scale_bias(meant), rtol=1e-5, atol=1e-5)
    for name in LINEARS:
        (w,) = weights(folder, name)
        assert torch.equal(layouts.unsigned8(made[f"{LAYER}{name}.weight"].T.contiguous()), w.codes)


def test_the_dense_class_of_023_takes_groups_and_keeps_every_number(classes: Path, tmp_path: Path) -> None:
    folder = ported(tmp_path, LINEARS, QuantSpec(4, 64, scale_dtype=torch.bfloat16), None)
    made = judged(classes, folder)
    for name in LINEARS:
        (w,) = weights(folder, name)
        assert torch.equal(layouts.unpack_along_n(made[f"{LAYER}{name}.weight"]), w.codes)
        assert torch.equal(made[f"{LAYER}{name}.weight_scale_second"].float(), w.scales.T)


def test_the_static_class_of_023_computes_what_the_scales_say(classes: Path, tmp_path: Path) -> None:
    """Linears with one calibrated activation scale, one of them with a bias, which is added to integer sums."""
    generator, native = torch.Generator().manual_seed(1), find_format("compressed-tensors")
    spec = QuantSpec(8, PER_CHANNEL, scale_dtype=torch.float32, act=ActSpec(static=True))
    names = [LAYER + name for name in LINEARS]
    floats = {name: torch.randn(LINEARS[name.removeprefix(LAYER)], generator=generator) / 16 for name in names}
    tensors = {f"{names[0]}.bias": torch.randn(HIDDEN, generator=generator)}
    for name in names:
        tensors |= native.encode(name, quantize_rtn(floats[name], spec)) | {
            f"{name}.input_scale": torch.tensor([0.03125])
        }
    (tmp_path / "source").mkdir()
    save_file(tensors, tmp_path / "source" / "model.safetensors")
    config = {"model_type": "qwen2", "num_hidden_layers": 1} | native.finish(dict.fromkeys(names, spec), {})[
        "config.json"
    ]
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    transload.port(tmp_path / "source", tmp_path / "ported", "vllm-ascend==0.23")
    made = judged(classes, tmp_path / "ported")
    x = torch.randn(5, HIDDEN, generator=generator)
    for name in names:
        layer = {n.removeprefix(f"{name}."): t for n, t in made.items() if n.startswith(f"{name}.")}
        steps = (x / layer["aclnn_input_scale"].float() + layer["input_offset"]).round().clamp(-128, 127)
        y = (steps.double() @ layer["weight"].double() + layer["quant_bias"]) * layer["deq_scale"]
        want = x @ floats[name].T + tensors.get(f"{name}.bias", torch.zeros(HIDDEN))
        assert float((y - want).square().sum() / want.square().sum()) < 1e-3  # 30 dB, both roundings
