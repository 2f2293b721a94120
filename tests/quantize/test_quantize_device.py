"""Quantizing on an accelerator: refusals by name, and that everything of a layer is made where the layer is."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_models
import torch
from quantized_models import recipe, run

import transload
from transload.errors import ConfigError
from transload.quantize.device import find_device, move, move_arguments
from transload.quantize.gptq import _invert, _reorder, group_aware_order
from transload.quantize.held import held_of
from transload.quantize.rtn import searched_scales
from transload.quantize.skeleton import Skeleton, forward
from transload.quantize.statistics import Watch
from transload.requantize import parse_spec

ELSEWHERE = torch.device("meta")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen"
    tiny_models.make("qwen2-tied", folder)
    return folder


@pytest.mark.parametrize(
    ("name", "message"), [("gpu", "knows no such device"), ("cuda:99", "cuda:99"), ("", "knows no such device")]
)
def test_devices_that_are_not_there_are_refused_before_any_work(
    name: str, message: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(model, tmp_path / "out", recipe(), device=name)
    assert not list(tmp_path.glob("out*"))


def test_cpu_is_always_there() -> None:
    assert find_device("cpu").type == "cpu"


def test_a_layer_its_statistics_and_the_maths_follow_the_device(model: Path) -> None:
    """The meta device stands in for an accelerator: no numbers, but no operation on tensors of two devices either."""
    skeleton = Skeleton(transload.open(model))
    filled, arguments = skeleton.layer(0), skeleton.arguments(12)[0]
    linears = [held for _, held in held_of(filled.layer)]
    with torch.no_grad(), torch.device(ELSEWHERE):
        move(filled, ELSEWHERE)
        run_layer = forward(filled.layer, move_arguments(arguments, ELSEWHERE))
        watch = Watch(set(linears), 1)
        for held in linears:
            held.watch = watch
        assert run_layer(torch.zeros(2, 12, 64)).device == ELSEWHERE
        watch.finish()
        for seen in watch.of.values():
            assert seen.gram is not None
            order = group_aware_order(seen.gram.diagonal(), 32)
            _reorder(seen.gram, order)
            made = (seen.gram, seen.rows, seen.absmax, seen.absmean, order, _invert(seen.gram))
            assert {t.device for t in made} == {ELSEWHERE}
        weight = linears[0].rows(slice(None))
        scales, zeros = searched_scales(weight.reshape(len(weight), -1, 32), parse_spec("int4-g32-asym"), None)
        assert zeros is not None
        assert {weight.device, scales.device, zeros.device} == {ELSEWHERE}
