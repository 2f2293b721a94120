"""What a person sees of a start, and which interface an address belongs to."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console

from transload.serve.display import Display, share
from transload.serve.events import Event
from transload.serve.network import interface_of

EVENTS = (
    Event("starting", "engine-0", "started (process 7), log in /tmp/engine-0.log", {"pid": 7}),
    Event("stage", "engine-0", "starting workers"),
    Event("loading", "engine-0", "loading weights: 50%", {"stage": "loading weights", "fraction": 0.5}),
    Event("cache", "engine-0", "KV cache of 87,296 tokens, as planned", {"kv_tokens": 87296}),
    Event("ready", "engine-0", "ready after 33 s: http://127.0.0.1:8000/v1", {"url": "http://127.0.0.1:8000/v1"}),
    Event("load", "engine-0", "3 running, 0 waiting, 9.7 tokens/s"),
    Event("peer", "engine-0", "node b is gone: [red]its connection\x1b]0;title\x07 ended"),
    Event("failed", "engine-0", "the engine was killed (SIGKILL). Next: less RAM."),
    Event("stopped", "engine-0", "stopped", {"code": 1}),
)


def shown(terminal: bool) -> str:
    out = io.StringIO()
    with Display(Console(file=out, force_terminal=terminal, width=120, no_color=True)) as display:
        for event in EVENTS:
            display(event)
    return out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_sentences_worth_keeping_are_shown_once(terminal: bool) -> None:
    text = shown(terminal)
    for event in EVENTS:
        if event.kind in ("starting", "cache", "ready", "failed"):
            assert text.count(event.text) == 1, event
    assert "[red]its connection ]0;title  ended" in text  # another machine's words are neither markup nor commands


def test_without_a_terminal_there_are_lines_only() -> None:
    lines = shown(False).splitlines()
    assert len(lines) == 7
    assert all(line.startswith("engine-0 ") for line in lines)
    assert "\x1b" not in "".join(lines)


def test_a_bar_only_grows() -> None:
    stages = (
        "reading the configuration of Qwen2ForCausalLM", "starting workers", "joining the other workers",
        "workers joined", "loading weights", "weights loaded", "compiling", "capturing graphs", "graphs captured",
        "starting the server",
    )  # fmt: skip
    shares = [share(stage, fraction) for stage in stages for fraction in (None, 0.5, 1.0)]
    assert None not in shares
    assert shares == sorted(shares, key=lambda s: s or 0)
    assert share("something new", None) is None


@pytest.mark.skipif(sys.platform != "linux", reason="loopback has another name elsewhere")
def test_the_interface_of_an_address() -> None:
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.99") is None
    assert interface_of("2001:db8::99") is None
