"""Runs that are killed, repeated or fed with nonsense: results repeat, and nothing half-written stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
import torch
from quantized_models import Bytes, recipe, run, text_file
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import transload
from transload.cli import app
from transload.errors import ConfigError, FormatError, OutputExists
from transload.quantize.recipe import Calibration
from transload.quantize.text import windows


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_models.make("llama", folder)
    return folder


def changed(source: Path, out: Path, name: str, change: float) -> Path:
    """The model with one number of a tensor replaced."""
    out.mkdir()
    (out / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[5] = change
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


class Killed(BaseException):
    pass


def test_the_same_request_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        run(llama, tmp_path / name, recipe())
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_killed_run_resumes_to_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    made = recipe(rotate=True)
    run(llama, tmp_path / "whole", made)

    def kill(done: int, total: int, what: str) -> None:
        if what == "layer 1":
            raise Killed

    with pytest.raises(Killed):
        run(llama, tmp_path / "out", made, resume=True, progress=kill)
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.quantizing" / "layer-0000.safetensors").exists()
    with pytest.raises(OutputExists, match="unfinished"):
        run(llama, tmp_path / "out", made)
    with pytest.raises(ConfigError, match="another model, recipe or text"):
        run(llama, tmp_path / "out", recipe(), resume=True)
    told: list[str] = []
    run(llama, tmp_path / "out", made, resume=True, progress=lambda done, total, what: told.append(what))
    assert "layer 0" not in told
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert not (tmp_path / "out.quantizing").exists()


def test_an_existing_output_is_kept(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    with pytest.raises(OutputExists):
        run(llama, tmp_path / "out", recipe("int4-g32", "rtn"))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_weights_that_are_not_finite_leave_nothing(method: str, llama: Path, tmp_path: Path) -> None:
    broken = changed(llama, tmp_path / "m", "model.layers.1.mlp.up_proj.weight", float("nan"))
    with pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj contains NaN"):
        run(broken, tmp_path / "out", recipe(method=method))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calibration.txt", "m"]


def test_activations_that_are_not_finite_name_the_layer(llama: Path, tmp_path: Path) -> None:
    broken = changed(llama, tmp_path / "m", "model.layers.1.input_layernorm.weight", float("inf"))
    with pytest.raises(ConfigError, match=r"layer 1: .*q_proj.* infinite activations"):
        run(broken, tmp_path / "out", recipe())
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.quantizing").exists()


def test_a_rule_that_names_no_module_is_an_error(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rule for experts names no module"):
        run(llama, tmp_path / "out", "w4a8-ascend-moe")
    rules = [{"modules": ["mlp"], "layers": [7], "scheme": "int4-g32"}]
    with pytest.raises(ConfigError, match=r"mlp in layers 7 names no module"):
        run(llama, tmp_path / "out", recipe(rules=rules))


def test_groups_that_do_not_divide_get_smaller_and_are_listed(llama: Path, tmp_path: Path) -> None:
    report = run(llama, tmp_path / "out", recipe("int4-g128", "rtn"))
    notes = {m.name: m.note for m in report.fallbacks}
    assert notes["model.layers.0.mlp.up_proj"] == "groups of 64: 128 do not divide 64"
    assert "model.layers.0.mlp.down_proj" not in notes


def test_a_singular_hessian_is_listed(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "same.txt"
    text.write_text("a" * 400)  # one token, over and over
    report = run(llama, tmp_path / "out", recipe(damping=0.0), calibration=text)
    assert any("damping raised to" in m.note for m in report.modules)


TEXTS = [
    ("empty.txt", "", "holds no text"),
    ("short.txt", "just a few words", "fewer than one window of 32"),
    ("broken.jsonl", '{"text": "a"}\n{"text": ', "line 2: not valid JSON"),
    ("odd.jsonl", '{"words": "a"}', "expected"),
]


@pytest.mark.parametrize(("name", "text", "message"), TEXTS, ids=[t[0] for t in TEXTS])
def test_text_that_cannot_calibrate_is_refused(name: str, text: str, message: str, llama: Path, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        run(llama, tmp_path / "out", recipe(), calibration=tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_windows_follow_the_seed_and_say_where_they_come_from(tmp_path: Path) -> None:
    text = text_file(tmp_path)
    one, said = windows(text, Calibration(samples=10, tokens=32, seed=1), Bytes())
    again, _ = windows(text, Calibration(samples=10, tokens=32, seed=1), Bytes())
    other, _ = windows(text, Calibration(samples=10, tokens=32, seed=2), Bytes())
    assert one.shape == (10, 32)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert said == f"10 windows of 32 tokens from {text}"
    sample, _ = windows(None, Calibration(tokens=64), Bytes())
    assert len(sample) > 30  # Chinese, English and code


def test_conversations_go_through_the_chat_template(tmp_path: Path) -> None:
    class Chat(Bytes):
        def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool) -> str:
            return "".join(f"<{m['role']}>{m['content']}" for m in messages)

    (tmp_path / "c.jsonl").write_text('{"messages": [{"role": "user", "content": "hello"}]}\n{"text": "plain"}\n')
    found, _ = windows(tmp_path / "c.jsonl", Calibration(tokens=16), Chat())
    assert bytes(found[0].tolist())[:11] == bytes(b % 80 for b in b"<user>hello")
    chat, _ = windows(tmp_path / "c.jsonl", Calibration(tokens=16, chat=True), Chat())
    assert chat.numel() >= found.numel()


def test_transload_quantize_is_a_function() -> None:
    assert callable(transload.quantize)


def test_the_command_line(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: r\nrules: [{modules: ['*'], scheme: int4-g32, method: mse}]\n")
    ask = ["quantize", str(llama), str(tmp_path / "out"), "--recipe", str(tmp_path / "r.yaml")]
    out = CliRunner().invoke(app, ask, env={"COLUMNS": "160"})
    assert out.exit_code == 0
    assert "layers.*.mlp.up_proj" in out.stdout
    assert "no text needed" in out.stdout
    report = json.loads(CliRunner().invoke(app, [*ask, "--overwrite", "--json"]).stdout)
    assert len(report["modules"]) == 14
    assert report["port"]["target_format"] == "compressed-tensors"
    refused = CliRunner().invoke(app, [*ask, "--overwrite", "--recipe", "int3"])
    assert isinstance(refused.exception, ConfigError)
