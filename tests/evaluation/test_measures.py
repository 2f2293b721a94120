"""The measures against their definitions in float64, written out."""

from __future__ import annotations

import math

import pytest
import torch

from transload.errors import ConfigError
from transload.evaluation.limits import METRICS, Limit, parse_limits
from transload.evaluation.measures import Compared, Sqnr, compare, perplexity, standard_error
from transload.evaluation.windows import windows


@pytest.fixture
def two_models() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    source = torch.randn(40, 30, generator=generator) * 3
    return source + torch.randn(40, 30, generator=generator) * 0.3, source, torch.arange(40) % 30


def test_losses_and_divergence_are_those_of_the_definitions(two_models: tuple[torch.Tensor, ...]) -> None:
    logits, source, targets = two_models
    found = compare(logits, source, targets)
    for t in range(40):
        p = [math.exp(float(v)) for v in source[t].double()]
        q = [math.exp(float(v)) for v in logits[t].double()]
        p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
        assert float(found.loss[t]) == pytest.approx(-math.log(q[targets[t]]), abs=1e-5)
        assert float(found.source_loss[t]) == pytest.approx(-math.log(p[targets[t]]), abs=1e-5)
        assert float(found.kl[t]) == pytest.approx(
            sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)), abs=1e-5
        )
        best_p, best_q = (sorted(range(30), key=v.__getitem__, reverse=True) for v in (p, q))
        assert found.likeliest[t] == best_q[0]
        assert found.source_likeliest[t] == best_p[0]
        assert float(found.top5[t]) == pytest.approx(len(set(best_p[:5]) & set(best_q[:5])) / 5)


def test_a_model_beside_itself_differs_in_nothing(two_models: tuple[torch.Tensor, ...]) -> None:
    logits, _, targets = two_models
    found = compare(logits, logits, targets)
    assert float(found.kl.max()) == 0
    assert bool((found.top5 == 1).all())
    assert torch.equal(found.loss, found.source_loss)


def test_joined_parts_are_the_whole(two_models: tuple[torch.Tensor, ...]) -> None:
    logits, source, targets = two_models
    whole = compare(logits, source, targets)
    parts = [compare(logits[i : i + 7], source[i : i + 7], targets[i : i + 7]) for i in range(0, 40, 7)]
    joined = Compared.join(parts)
    torch.testing.assert_close(joined.kl, whole.kl)
    assert torch.equal(joined.likeliest, whole.likeliest)


def test_sqnr_is_twenty_decibels_for_a_tenth_of_the_signal() -> None:
    sqnr, signal = Sqnr(), torch.randn(50, generator=torch.Generator().manual_seed(0))
    sqnr.add(signal[:20], signal[:20] * 1.1)
    sqnr.add(signal[20:], signal[20:] * 0.9)
    assert sqnr.db == pytest.approx(20, abs=1e-3)
    exact = Sqnr()
    exact.add(signal, signal)
    assert exact.db == math.inf


def test_perplexity_of_equal_losses_and_its_error() -> None:
    assert perplexity(torch.full((10,), math.log(7))) == pytest.approx(7, rel=1e-6)
    assert perplexity(torch.tensor([1e6])) == math.inf
    assert standard_error(torch.tensor([1.0, 3.0])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("count", "length", "stride"), [(2, 8, 4), (10, 6, 3), (100, 16, 15), (33, 32, 1), (64, 64, 32)]
)
def test_every_token_but_the_first_is_scored_once_with_enough_before_it(count: int, length: int, stride: int) -> None:
    ids = torch.arange(count)
    pieces = list(windows(ids, length, stride))
    scored = [int(token) for w in pieces for token in w.ids[w.first :]]
    assert scored == list(range(1, count))
    for w in pieces:
        assert len(w.ids) <= length
        assert torch.equal(w.ids, ids[w.start : w.start + len(w.ids)])
        assert w.scored > 0
        assert w.start == 0 or w.first >= length - stride


@pytest.mark.parametrize(("length", "stride"), [(1, 1), (8, 0), (8, 8), (8, -1)])
def test_windows_that_make_no_sense_are_refused(length: int, stride: int) -> None:
    with pytest.raises(ConfigError, match="window"):
        list(windows(torch.arange(20), length, stride))


@pytest.mark.parametrize(
    ("text", "found", "broken"),
    [("kl>0.05", 0.06, True), ("kl>0.05", 0.05, False), ("top1<95%", 0.94, True), ("ppl_increase >= 1e-2", 0.01, True)],
)
def test_a_limit_says_what_it_found(text: str, found: float, broken: bool) -> None:
    limit = parse_limits([text], against=True)[0]
    sentence = limit.broken_by({limit.metric: found})
    assert (sentence is not None) == broken
    assert sentence is None or f"{found:.6g}" in sentence


def test_what_was_not_measured_breaks_a_limit() -> None:
    assert "not measured" in str(Limit("write", "<", 3).broken_by({}))
    assert "not measured" in str(Limit("kl", ">", 3).broken_by({"kl": math.nan}))


@pytest.mark.parametrize(
    ("text", "against", "message"),
    [("kl=3", True, "no limit"), ("kl>", True, "no limit"), ("kl>1e", True, "no limit"), ("magic>3", True, "no metric"),
     ("kl>3", False, "--against"), ("", True, "no limit")],
)  # fmt: skip
def test_limits_that_cannot_be_checked_are_refused_before_the_work(text: str, against: bool, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_limits([text], against)
    assert "kl" in METRICS
