"""The model benchmark on a tiny model: who takes part, what is compared, and what is refused before anything starts."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import make
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

import transload
from transload import checkpoint as checkpoints
from transload.bench import model, model_report
from transload.bench.cli import app
from transload.bench.model_bytes import expert_share, stored_bytes, touched_bytes
from transload.bench.model_engines import Settings
from transload.bench.model_prompt import degenerate, prompt_of, shared
from transload.errors import ConfigError, FormatError, Unsupported
from transload.runtime import TransloadConfig, tokenizer

SETTINGS = Settings(threads=1, prompt_tokens=12, decode_tokens=8, rounds=2, text="w1 w2 w3 hello w4", limits=False)


def quiet(what: str) -> None:
    del what


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with 4-bit weights and a tokenizer of whole words."""
    floats, path = tmp_path_factory.mktemp("floats"), tmp_path_factory.mktemp("model")
    make("llama", floats)
    words = ["<end>", "<unk>", "hello"] + [f"w{i}" for i in range(93)]
    vocabulary = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, eos_token="<end>").save_pretrained(path)
    recipe = TransloadConfig(group_size=32, device="cpu")
    transload.load(floats, quantize=recipe, dtype=torch.float32).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def result(folder: Path) -> model.Result:
    return model.run(folder, replace(SETTINGS, environments=(Path(sys.executable),)), quiet)


def test_transload_and_transformers_answer_alike(result: model.Result) -> None:
    rows = {r.name: r for r in result.rows}
    assert list(rows) == ["transload w4a16", "transload w4a8", "transformers bf16", "transformers fp32"]
    assert all(len(r.tokens) == 9 and len(r.prompt_seconds) == len(r.decode_seconds) == 2 for r in result.rows)
    assert rows["transload w4a16"].same_tokens == rows["transformers fp32"].same_tokens == 9
    assert "W4A8" in rows["transload w4a8"].detail
    assert all(r.peak_bytes > 10**8 and r.load_seconds > 0 and r.cold_first_token_seconds > 0 for r in result.rows)


def test_ratios_compare_within_rounds(result: model.Result) -> None:
    rows = {r.name: r for r in result.rows}
    peer, ours = rows["transformers fp32"], rows["transload w4a8"]
    pairs = sorted(p / o for p, o in zip(peer.decode_seconds, ours.decode_seconds, strict=True))
    assert peer.faster["transload w4a8"][1] == pytest.approx(sum(pairs) / 2)
    assert set(ours.faster) == {"transload w4a16"}


def test_who_is_missing_is_told_with_the_reason(result: model.Result) -> None:
    assert "reads one GGUF file" in result.absent["llama.cpp, xllamacpp"]
    assert result.absent.keys() == {"llama.cpp, xllamacpp", "llama-cpp-python", "onnxruntime-genai"}


def test_bytes_of_a_token_leave_out_what_is_only_looked_up(folder: Path, result: model.Result) -> None:
    loaded = transload.load(folder, device="cpu")
    whole = sum(t.nbytes for t in {id(t): t for t in (*loaded.parameters(), *loaded.buffers())}.values())
    assert touched_bytes(loaded) == whole - loaded.get_input_embeddings().weight.nbytes == result.rows[0].weight_bytes
    stored = checkpoints.open(folder)
    embedding = stored.entries["model.embed_tokens.weight"].stored_bytes
    assert stored_bytes(stored) == sum(e.stored_bytes for e in stored.entries.values()) - embedding
    assert expert_share({"num_experts": 8, "num_experts_per_tok": 2}) == 0.25
    assert expert_share({"num_experts_per_tok": None}) == 1.0


def test_results_are_written(result: model.Result, tmp_path: Path) -> None:
    model_report.write_json(result, tmp_path / "t.json")
    rows = [json.loads(line) for line in (tmp_path / "t.json").read_text().splitlines()]
    assert [r["name"] for r in rows] == [r.name for r in result.rows]
    assert {"date", "machine", "versions", "prompt_seconds", "faster"} <= rows[0].keys()
    model_report.write_csv(result, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == list(dict.fromkeys(r.name for r in result.rows))
    assert all(float(line["w4a8_faster_decode"]) > 0 for line in lines)
    model_report.write_markdown(result, tmp_path / "t.md")
    assert (tmp_path / "t.md").read_text().count("\n") == 2 + len(result.rows)


def test_a_plot_is_drawn(result: model.Result, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model_report.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command_takes_processor_time_and_some_engines_only(folder: Path, tmp_path: Path) -> None:
    quick = ["--rounds", "1", "--prompt-tokens", "12", "--decode-tokens", "4", "--threads", "1", "--no-limits"]
    ran = CliRunner().invoke(
        app, ["model", str(folder), *quick, "--clock", "cpu", "--only", "transload w4a8", "--csv", f"{tmp_path}/t.csv"]
    )
    assert ran.exit_code == 0, ran.output
    assert "all times are processor time" in ran.output
    with (tmp_path / "t.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert row["clock"] == "cpu"
    assert float(row["tokens_per_second"]) > 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_tokens": 60}, "context holds 64"),
        ({"only": ("vllm",)}, "no contender 'vllm': there are transload w4a16"),
        ({"environments": (Path("/nowhere/python"),), "only": ("onnxruntime-genai",)}, "peer environment /nowhere"),
        ({"only": ("onnxruntime-genai",)}, "no engine could load the model: onnxruntime-genai: "),
    ],
)
def test_impossible_requests_are_refused(folder: Path, change: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        model.run(folder, replace(SETTINGS, **change), quiet)  # type: ignore[arg-type]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, FormatError), match=r"none\.gguf"):
        model.run(tmp_path / "none.gguf", SETTINGS, quiet)


def test_a_model_that_writes_no_text_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    with pytest.raises(Unsupported, match="BertModel does not continue a text"):
        model.run(tmp_path, SETTINGS, quiet)


def test_a_prompt_has_exactly_the_wanted_tokens(folder: Path) -> None:
    words = tokenizer(folder)
    for length in (2, 5, 40):
        prompt = prompt_of(words, SETTINGS.text, length)
        assert list(prompt.ids) == words(prompt.text)["input_ids"]
        assert len(prompt.ids) == length


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ([5, 6, 7, 8, 9, 10, 11, 12], None),
        ([1, 2, 3, 4, 9, 9, 9, 9, 9], "repeats 1 token from token 5 on"),
        ([7, 1, 2, 1, 2, 1, 2, 1, 2], "repeats 2 tokens from token 2 on"),
        ([], None),
    ],
)
def test_answers_that_are_no_text_are_recognized(tokens: list[int], found: str | None) -> None:
    assert degenerate(tokens) == found


def test_shared_tokens_are_counted_from_the_beginning() -> None:
    assert shared([1, 2, 4], [1, 2, 3]) == 2
    assert shared([1, 2, 3], [1, 2, 3]) == 3


def test_a_build_without_the_processors_instructions_is_named(
    result: model.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_report, "_processor_has", lambda flag: True)
    poor = replace(result.rows[0], name="llama.cpp, xllamacpp", detail="AVX2 FMA", idle=0.5)
    found = model_report.warnings(model.Result([poor], {}, None))
    assert "used 50% of a core" in found[0]
    assert "without AVX512" in found[1]
    assert model_report.warnings(model.Result([replace(poor, detail="AVX512", idle=0.0)], {}, None)) == []
