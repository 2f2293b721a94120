"""transload.evaluate on tiny models: its numbers are those of the plain computation with transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import make
from tiny_tokenizer import save_tokenizer
from typer.testing import CliRunner

import transload
from transload.errors import ConfigError, FormatError, OutputExists
from transload.evaluation import EvalReport, Request
from transload.evaluation.page import page

TEXT = "the quick brown fox jumps over the lazy dog and reads what it has found " * 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make("llama", path)
    save_tokenizer(path)
    (path / "text.txt").write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(folder: Path) -> EvalReport:
    rounded = Request(folder, bits=4)
    return transload.evaluate(rounded, folder, folder / "text.txt", tokens=60, window=24, stride=8)


def _plain(folder: Path, bits: int | None) -> torch.Tensor:
    """log p of every scored token's whole distribution, window by window as the docstring says, without our reader."""
    model = transload.load(folder, bits=bits, dtype=torch.float32)
    ids = transload.runtime.tokenizer(folder)(TEXT, return_tensors="pt")["input_ids"][0][:60]
    out, start = [], 0
    while start == 0 or start + 24 - 8 < 60:
        first = 1 if start == 0 else 24 - 8
        with torch.no_grad():
            logits = model(ids[start : start + 24].unsqueeze(0)).logits[0]
        out.append(logits.log_softmax(-1)[first - 1 : -1])
        start += 8
    return torch.cat(out), ids


def test_numbers_are_those_of_the_plain_computation(folder: Path, report: EvalReport) -> None:
    (q, ids), (p, _) = _plain(folder, 4), _plain(folder, None)
    assert len(q) == len(ids) - 1
    loss = -q[torch.arange(len(q)), ids[1:]].double()
    source_loss = -p[torch.arange(len(p)), ids[1:]].double()
    assert report.model.perplexity == pytest.approx(math.exp(loss.mean()), rel=1e-4)
    assert report.source.perplexity == pytest.approx(math.exp(source_loss.mean()), rel=1e-4)
    d = report.difference
    assert d.perplexity_increase == pytest.approx(math.exp((loss - source_loss).mean()) - 1, abs=1e-4)
    assert d.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert d.kl > 1e-4, "rounding to 4 bits must show"
    assert d.top1 == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert sum(d.kl_histogram) == len(q)


def test_every_layer_has_its_noise_and_the_worst_tokens_are_the_worst(report: EvalReport) -> None:
    d = report.difference
    assert list(d.sqnr) == ["embedding", "layer 0", "final norm"]
    assert d.sqnr["embedding"] == math.inf, "the embedding stays float"
    assert 5 < d.sqnr["final norm"] < 60
    assert [w.kl for w in d.worst] == sorted((w.kl for w in d.worst), reverse=True)
    assert d.worst[0].kl == pytest.approx(d.kl_max)
    assert all(w.token for w in d.worst)


def test_a_model_against_itself_differs_in_nothing(folder: Path) -> None:
    d = transload.evaluate(folder, folder, folder / "text.txt", tokens=40, window=16).difference
    assert (d.kl, d.top1, d.top5, d.perplexity_increase) == (0, 1, 1, 0)
    assert set(d.sqnr.values()) == {math.inf}
    assert torch.is_grad_enabled()  # whoever evaluates may train afterwards
    assert not torch.is_inference_mode_enabled()


def test_alone_there_is_no_difference_and_json_is_strict(folder: Path, report: EvalReport) -> None:
    alone = transload.evaluate(folder, text=folder / "text.txt", tokens=30, window=16)
    assert alone.source is None
    assert alone.difference is None
    assert "kl" not in alone.metrics()
    assert alone.model.kernels == ()
    text = json.dumps(report.as_json(), allow_nan=False)  # raises for infinities
    assert json.loads(text)["difference"]["sqnr"]["embedding"] is None


def test_a_head_that_does_more_than_multiply_is_noticed(tmp_path: Path) -> None:
    """Cohere scales its logits: hidden states and head alone would give other numbers."""
    config = transformers.CohereConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, logit_scale=4.0,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CohereForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    found = transload.evaluate(Request(tmp_path, bits=4), tmp_path, tmp_path / "text.txt", tokens=30, window=16)
    model = transload.load(tmp_path, dtype=torch.float32)
    ids = transload.runtime.tokenizer(tmp_path)(TEXT, return_tensors="pt")["input_ids"][:, :16]
    with torch.no_grad():
        first = float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]))
    short = transload.evaluate(tmp_path, text=tmp_path / "text.txt", tokens=16, window=16)
    assert math.log(short.model.perplexity) == pytest.approx(first, rel=1e-4)
    assert found.difference.kl > 0


def test_other_tokens_are_refused(folder: Path, tmp_path: Path) -> None:
    make("llama", tmp_path)
    save_tokenizer(tmp_path, reverse=True)
    with pytest.raises(ConfigError, match="different tokens"):
        transload.evaluate(folder, tmp_path, folder / "text.txt", tokens=20)


def test_texts_that_cannot_be_measured_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a", encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in (("short.txt", "two are needed"), ("binary.txt", "not UTF-8"), ("none.txt", "cannot be read")):
        with pytest.raises(ConfigError, match=message):
            transload.evaluate(folder, text=tmp_path / name)


def test_a_model_that_gives_nan_is_named(folder: Path, tmp_path: Path) -> None:
    model = make("llama", tmp_path)
    save_tokenizer(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    model.save_pretrained(tmp_path)
    with pytest.raises(FormatError, match="not finite"):
        transload.evaluate(tmp_path, text=folder / "text.txt", tokens=20)


def test_the_page_stands_alone_and_escapes_what_models_say(report: EvalReport) -> None:
    html = page(report, ["kl is 1, and kl>0 fails <b>"], limits=1)
    assert "<script" not in html
    assert "kl&gt;0 fails &lt;b&gt;" in html
    assert html.count("<svg") == 3
    assert "src=" not in html
    assert "https://" not in html.replace("https://matplotlib.org", "")


def _run(*arguments: object) -> tuple[int, str]:
    from transload.cli import app

    done = CliRunner().invoke(app, ["eval", *map(str, arguments)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_the_command_fails_when_a_limit_is_broken_and_writes_its_report(folder: Path, tmp_path: Path) -> None:
    base = (folder, "--bits", 4, "--against", folder, "--text", folder / "text.txt", "--tokens", 40, "--window", 16)
    code, out = _run(*base, "--json", "--fail-if", "kl>1e-9", "--fail-if", "top1<0")
    assert code == 2
    found = json.loads(out)
    assert found["metrics"]["kl"] > 0
    assert len(found["broken_limits"]) == 1
    code, out = _run(*base, "--html", tmp_path / "r.html", "--fail-if", "kl>100")
    assert (code, "hold" in out) == (0, True)
    assert (tmp_path / "r.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]
    with pytest.raises(OutputExists):
        _run(*base, "--html", tmp_path / "r.html")


def test_tasks_without_the_harness_are_refused_before_the_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install lm_eval"):
        _run(folder, "--tasks", "anything")
