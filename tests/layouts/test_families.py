"""Every family: what is quantized and what stays in float, under published names; ported and run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, RING, RING_CONFIG, RING_FLOATS, make, model_class
from safetensors.torch import load_file, save_file

import transload
from transload.errors import Unsupported
from transload.formats import find_format
from transload.inspection import inspect, role_of
from transload.models.roles import kept_in_float
from transload.quant import QTensor, QuantSpec
from transload.reference import quantize_rtn
from transload.runtime import TransloadConfig

# Kernels may carry float activations as 15-bit integers: 5e-5 a layer, more where a recurrent state adds them up.
W4A16 = 2e-3
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits.float()
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_quantized_ported_and_run(name: str, tmp_path: Path) -> None:
    family, config = FAMILIES[name], make(name, tmp_path / "float")
    rounded = transload.load(tmp_path / "float", quantize=TransloadConfig(group_size=32, device="cpu"))
    rounded.save_pretrained(tmp_path / "rounded")
    groups = inspect(tmp_path / "rounded").groups
    quantized = {g.role for g in groups if g.scheme.startswith("int4")}
    assert quantized == {f"{family.layer}.{module}" for module in family.quantized}
    floats = {g.role: kept_in_float(g.role.removesuffix(".weight")) for g in groups if _is_matrix(g.shape, g.role)}
    left = {role: reason for role, reason in floats.items() if role not in quantized}
    assert set(left.values()) == family.floats, left

    report = transload.port(tmp_path / "rounded", tmp_path / "ported", to="compressed-tensors")
    assert report.exact
    assert {role_of(m.name) for m in report.modules} == quantized
    ported = logits(transload.load(tmp_path / "ported", device="cpu"))
    assert torch.equal(ported, logits(rounded))
    twin = model_class(config).from_pretrained(
        None, config=config, state_dict=_floats(tmp_path / "ported"), dtype=torch.float32
    )
    expected = logits(twin)
    assert float((ported - expected).norm() / expected.norm()) < W4A16


def _is_matrix(shape: tuple[int, ...], role: str) -> bool:
    return len(shape) > 1 and not role.endswith(("pos_emb.weight", "patch_embed.proj.weight"))


def _floats(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, quantized ones as the floats that they mean."""
    checkpoint, found = transload.open(folder), {}
    for name in checkpoint.entries:
        value = checkpoint[name]
        found[f"{name}.weight" if isinstance(value, QTensor) else name] = (
            value.dequantize() if isinstance(value, QTensor) else value
        )
    return found


def _quantized(folder: Path, names: set[str], config: dict[str, Any]) -> dict[str, Any]:
    """Quantizes some modules of a float checkpoint in place, as compressed-tensors; returns its config.json."""
    format, spec = find_format("compressed-tensors"), QuantSpec(4, 32, scale_dtype=torch.float16)
    stored: dict[str, torch.Tensor] = {}
    floats = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module in names:
            stored |= format.encode(module, quantize_rtn(tensor, spec))
        else:
            stored[name] = tensor
            if tensor.dim() == 2:
                floats[module] = tuple(tensor.shape)
    save_file(stored, folder / "model.safetensors")
    full = config | format.finish(dict.fromkeys(names, spec), floats)["config.json"]
    (folder / "config.json").write_text(json.dumps(full))
    return full


def test_ring_2_5_is_ported_under_its_own_names_and_not_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = tmp_path / "ring"
    source.mkdir()
    save_file({name: torch.randn(shape) for name, shape in RING.items()}, source / "model.safetensors")
    matrices = {name.removesuffix(".weight") for name, shape in RING.items() if len(shape) == 2}
    kept = {name for name in matrices if kept_in_float(name) is not None}
    assert kept == {name for name in matrices if any(f".{part}." in f".{name}." for part in RING_FLOATS)}
    _quantized(source, matrices - kept, RING_CONFIG)
    report = transload.port(source, tmp_path / "ported", to="gptq")
    assert report.exact
    entries = transload.open(tmp_path / "ported").entries.values()
    assert {e.name for e in entries if e.spec is not None} == matrices - kept
    assert {e.name for e in entries if e.spec is None} == {
        n for n in RING if n[: -len(".weight")] not in matrices - kept
    }
    with pytest.raises(Unsupported, match=r"no class for Ring-2\.5") as failed:
        transload.load(tmp_path / "ported", device="cpu")
    assert "vLLM runs the model" in str(failed.value)


def test_layers_of_multi_token_prediction_are_carried_and_not_run(tmp_path: Path) -> None:
    config = make("glm4_moe", tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    last = config.num_hidden_layers
    extra = {n.replace("layers.1.", f"layers.{last}."): t.clone() for n, t in tensors.items() if "layers.1." in n}
    extra |= {f"model.layers.{last}.{n}.weight": torch.randn(64) for n in ("enorm", "hnorm", "shared_head.norm")}
    extra |= {f"model.layers.{last}.eh_proj.weight": torch.randn(64, 128)}
    save_file(tensors | extra, tmp_path / "m" / "model.safetensors")
    settings = json.loads((tmp_path / "m" / "config.json").read_text())
    names = {
        n.removesuffix(".weight") for n, t in (tensors | extra).items() if t.dim() == 2 and n.endswith("_proj.weight")
    }
    quantized = {n for n in names if kept_in_float(n) is None}
    _quantized(tmp_path / "m", quantized, settings)
    transload.port(tmp_path / "m", tmp_path / "ported", to="gptq")
    ported = transload.open(tmp_path / "ported")
    assert f"model.layers.{last}.eh_proj.weight" in ported.entries
    assert ported.entries[f"model.layers.{last}.self_attn.q_proj"].spec is not None
    model = transload.load(tmp_path / "ported", device="cpu")
    assert torch.isfinite(logits(model)).all()
    assert len(model.model.layers) == last


def test_an_unknown_architecture_is_ported_as_it_is_stored_and_says_so(tmp_path: Path) -> None:
    source = tmp_path / "m"
    source.mkdir()
    tensors = {"net.blocks.0.in_map.weight": torch.randn(64, 64), "net.blocks.0.scale": torch.ones(64)}
    save_file(tensors, source / "model.safetensors")
    _quantized(source, {"net.blocks.0.in_map"}, {"model_type": "novel", "architectures": ["NovelForCausalLM"]})
    report = transload.port(source, tmp_path / "ported", to="awq", requantize="int4-g32-asym")
    assert any("model_type 'novel' is not known here" in note for note in report.notes)
    assert set(transload.open(tmp_path / "ported").entries) == {"net.blocks.0.in_map", "net.blocks.0.scale"}


@pytest.mark.parametrize("name", ["qwen3_5_moe", "qwen3_moe"])
def test_experts_stored_as_one_stack_are_the_same_model(name: str, tmp_path: Path) -> None:
    """Some publishers store [E, 2I, H] and [E, H, I], as transformers keeps them, others one linear per expert."""
    make(name, tmp_path / "single")
    tensors = load_file(tmp_path / "single" / "model.safetensors")
    stacked = {n: t for n, t in tensors.items() if ".experts." not in n}
    for layer in {n.split(".experts.")[0] for n in tensors if ".experts." in n}:
        parts = {p: torch.stack([tensors[f"{layer}.experts.{e}.{p}_proj.weight"] for e in range(4)]) for p in _PARTS}
        stacked[f"{layer}.experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], 1)
        stacked[f"{layer}.experts.down_proj"] = parts["down"]
    (tmp_path / "stacked").mkdir()
    save_file(stacked, tmp_path / "stacked" / "model.safetensors")
    (tmp_path / "stacked" / "config.json").write_text((tmp_path / "single" / "config.json").read_text())
    recipe = TransloadConfig(group_size=32, device="cpu")
    found = [logits(transload.load(tmp_path / kind, quantize=recipe)) for kind in ("single", "stacked")]
    assert torch.equal(*found)


_PARTS = ("gate", "up", "down")
