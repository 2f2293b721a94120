"""A model over several places: the same numbers, from RAM, from disk, and on the devices that a plan names."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from gguf_model import CASES, build
from tiny_models import logits, make

import transload
from transload.errors import ConfigError, DoesNotFit, Unsupported
from transload.hal import Device
from transload.plan.planner import plan
from transload.runtime import report, targets
from transload.runtime.placement import Target
from transload.runtime.spread import Spread, device_of
from transload.runtime.weight import PackedWeight

ARCHITECTURES = ("llama", "qwen2-tied", "qwen3-moe", "glm4-moe")


def _half_on_disk(layers: int, tied: bool = False) -> dict[str, str | int]:
    below = {f"model.layers.{i}": "cpu" if i == 0 else "disk" for i in range(layers)}
    return {"model.embed_tokens": "cpu", **below, "model.norm": "disk", "lm_head": "cpu" if tied else "disk"}


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_on_disk_compute_the_same_and_stay_there(architecture: str, bits: int | None, tmp_path: Path) -> None:
    made = make(architecture, tmp_path / "m")
    whole = transload.load(tmp_path / "m", device="cpu", bits=bits)
    places = _half_on_disk(made.config.num_hidden_layers, made.config.tie_word_embeddings)
    spread = transload.load(tmp_path / "m", plan=places, bits=bits)
    assert torch.equal(logits(spread), logits(whole))
    assert torch.equal(logits(spread), logits(whole))
    assert {p.device.type for p in spread.model.layers[1].parameters()} == {"meta"}
    kept = [w for w in spread.model.layers[1].modules() if isinstance(w, PackedWeight)]
    assert all(t.device.type == "meta" for w in kept for t in w.packed.tensors.values())
    assert all(p.device.type == "cpu" for p in spread.model.layers[0].parameters())


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3moe", "deepseek2"])
def test_a_stored_model_is_spread_by_a_plan_of_its_own(architecture: str, tmp_path: Path) -> None:
    build(next(c for c in CASES if c.arch == architecture), tmp_path / "m.gguf")
    whole = transload.load(tmp_path / "m.gguf", device="cpu")
    probe = plan(tmp_path / "m.gguf", _machine("2 GiB"), {"context": 16})
    context = next(r for r in probe.rooms if r.device == "cpu").size
    first = sum(m.size + m.cache for m in probe.modules[:2]) + max(m.size for m in probe.modules)
    tight = plan(tmp_path / "m.gguf", _machine(str((2 << 30) - round((context - first) / 0.92))), {"context": 16})
    places = tight.device_map()
    assert set(places.values()) == {"cpu", "disk"}
    spread = transload.load(tmp_path / "m.gguf", plan=tight, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(spread), logits(whole))
    assert sum(f.stat().st_size for f in (tmp_path / "offload").glob("*.dat"))
    assert {m.device for m in report(spread).modules} == {"cpu", "disk"}


def _machine(memory: str) -> dict[str, object]:
    return {"nodes": [{"name": "n", "devices": [{"type": "CPU", "memory": memory}], "disk": "1 GiB"}]}


def test_a_plan_for_this_machine_is_made_on_request(tmp_path: Path) -> None:
    make("llama", tmp_path / "m")
    planned = transload.load(tmp_path / "m", plan="auto", bits=4)
    assert torch.equal(logits(planned), logits(transload.load(tmp_path / "m", bits=4)))


def test_a_temporary_folder_goes_with_the_model(tmp_path: Path) -> None:
    make("llama", tmp_path / "m")
    model = transload.load(tmp_path / "m", plan=_half_on_disk(2), bits=4)
    folder = model._transload_spread.folder
    assert any(folder.iterdir())
    with pytest.raises(Unsupported, match="partly on disk is not saved"):
        model.save_pretrained(tmp_path / "saved")
    del model
    gc.collect()
    assert not folder.exists()


def test_a_plan_that_cannot_be_followed_says_why(tmp_path: Path) -> None:
    make("llama", tmp_path / "m")
    with pytest.raises(ConfigError, match="the plan names the devices"):
        transload.load(tmp_path / "m", plan="auto", device="cpu")
    with pytest.raises(ConfigError, match="give a Plan, a device_map, or 'auto'"):
        transload.load(tmp_path / "m", plan="balanced")
    with pytest.raises(ConfigError, match=r"places 'model.layers.7', which this model does not have"):
        transload.load(tmp_path / "m", plan={**_half_on_disk(2), "model.layers.7": "disk"}, bits=4)
    with pytest.raises(ConfigError, match="leaves modules without a place"):
        transload.load(tmp_path / "m", plan={"model.layers.0": "cpu", "lm_head": "disk"})
    small = {"nodes": [{"name": "n", "devices": [{"type": "CPU", "memory": "1 GiB"}]}]}
    with pytest.raises(DoesNotFit, match="raise host_memory or disk"):
        transload.load(tmp_path / "m", plan=plan(tmp_path / "m", small, {"context": 64}))


class _TwoCards:
    """A backend that has two devices, as far as choosing between them goes."""

    name, priority = "cuda", 0

    def unavailable(self) -> None:
        return None

    def devices(self) -> list[Device]:
        return [Device("cuda", i, f"card {i}", "sm_90", 80 << 30, 80 << 30) for i in range(2)]

    def torch_device(self, device: Device) -> torch.device:
        return torch.device("cuda", device.index)


def test_layers_go_to_the_devices_that_the_plan_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from transload import hal

    cards, cpu = _TwoCards(), hal.find_device("cpu")[0]
    monkeypatch.setattr(targets, "backends", lambda: {"cuda": cards, "cpu": cpu})
    spread = Spread({"embed": 0, "layers.0": 0, "layers.1": 1, "layers.2": "cpu", "layers.3": "disk"})
    found = targets.Targets(Target(cards, cards.devices()[0]), None, spread)  # type: ignore[arg-type]
    names = {f"layers.{i}.mlp": found.of(f"layers.{i}.mlp").device for i in range(4)}
    assert [(d.backend, d.index) for d in names.values()] == [("cuda", 0), ("cuda", 1), ("cpu", 0), ("cpu", 0)]
    assert spread.first == torch.device("cuda:0")
    assert spread.alone is None
    assert spread.for_floats()["layers.1"] == torch.device("cuda:1")
    assert device_of("disk") == torch.device("cpu")


def test_names_of_a_checkpoint_find_the_models_modules() -> None:
    inner = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Identity(), torch.nn.Identity()])})
    model = torch.nn.ModuleDict({"model": inner, "lm_head": torch.nn.Identity()})
    spread = Spread({"model.language_model.layers.1": "cpu", "language_model.lm_head": "cpu"})
    spread.on(model)
    assert set(spread.places) == {"model.layers.1", "lm_head"}
    assert spread.place_of("model.layers.1.mlp") == "cpu"
    assert spread.place_of("model.layers.0") is None
