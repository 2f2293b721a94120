"""Many chats at once for a while, against any OpenAI-compatible server: does it lose a request?

    transload serve qwen-vllm-cpu --context 1k --concurrency 64 &
    python examples/load_test.py http://127.0.0.1:8000/v1 --chats 64 --seconds 120

Each of `--chats` clients asks, reads the streamed answer to its end, and asks again until the time is over; then the
running ones finish. A request is lost when its answer does not end as the protocol says ("finish_reason", [DONE]), or
when it was refused. With `--stop-pid` the server gets SIGTERM half-way. Refusals of requests that began after that are
counted apart: a server that drains finishes what it has begun and takes nothing new. Exit code 1 when one was lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import time
from dataclasses import dataclass, field

import httpx

ON_THE_WAY = 2.0  # seconds between a client's decision to ask and the server's knowledge of it


@dataclass
class Result:
    """What happened. first, whole: seconds to the first token and to the end of each answer."""

    finished: int = 0
    tokens: int = 0
    refused: int = 0  # after the server was told to stop
    lost: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)


async def answer(client: httpx.AsyncClient, body: dict[str, object], result: Result, stopped: asyncio.Event) -> None:
    """One chat."""
    began, first, tokens, reason, done = time.monotonic(), None, 0, None, False
    late = stopped.is_set()
    try:
        async with client.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")[:160]
                raise ConnectionRefusedError(f"HTTP {response.status_code}: {text}")
            async for line in response.aiter_lines():
                if line == "data: [DONE]":
                    done = True
                elif line.startswith("data: "):
                    choice = json.loads(line[6:])["choices"][0]
                    tokens += bool(choice["delta"].get("content"))
                    first = first or time.monotonic()
                    reason = choice["finish_reason"] or reason
    except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
        # Begun after SIGTERM, or so shortly before that it reached the server after it: it may be refused.
        late = late or (stopped.is_set() and time.monotonic() - began < ON_THE_WAY)
        if late and not tokens:
            result.refused += 1
            await asyncio.sleep(0.2)
        else:
            result.lost.append(f"{error!r} after {tokens} tokens")
        return
    if not done or reason is None:
        result.lost.append(f"ended without [DONE] or finish_reason after {tokens} tokens")
        return
    result.finished += 1
    result.tokens += tokens
    result.first.append((first or time.monotonic()) - began)
    result.whole.append(time.monotonic() - began)


async def run(url: str, chats: int, seconds: float, tokens: int, timeout: float, stop_pid: int | None) -> Result:
    """`chats` clients for `seconds`."""
    result, stopped, end = Result(), asyncio.Event(), time.monotonic() + seconds
    limits = httpx.Limits(max_connections=chats, max_keepalive_connections=chats)
    wait = httpx.Timeout(timeout, connect=30)
    async with httpx.AsyncClient(
        base_url=url.rstrip("/") + "/", limits=limits, timeout=wait, trust_env=False
    ) as client:
        model = (await client.get("models")).raise_for_status().json()["data"][0]["id"]

        async def chat(number: int) -> None:
            turn = 0
            while time.monotonic() < end:
                question = f"Client {number}, question {turn}: name {number % 7 + 2} animals."
                messages = [{"role": "user", "content": question}]
                body = {"model": model, "messages": messages, "max_tokens": tokens, "stream": True}
                await answer(client, body, result, stopped)
                turn += 1

        async def stop() -> None:
            if stop_pid is not None:
                await asyncio.sleep(seconds / 2)
                stopped.set()
                os.kill(stop_pid, signal.SIGTERM)

        await asyncio.gather(stop(), *(chat(n) for n in range(chats)))
    return result


def main() -> int:
    """Prints one line, and the first lost requests."""
    parser = argparse.ArgumentParser(description="Does a server lose a request under load?")
    parser.add_argument("url", help="base URL, ending in /v1")
    parser.add_argument("--chats", type=int, default=64, help="clients at once")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--tokens", type=int, default=16, help="longest answer")
    parser.add_argument("--timeout", type=float, default=300, help="seconds without a byte that count as lost")
    parser.add_argument("--stop-pid", type=int, help="the server's process, to send SIGTERM half-way")
    given = parser.parse_args()
    began = time.monotonic()
    result = asyncio.run(run(given.url, given.chats, given.seconds, given.tokens, given.timeout, given.stop_pid))
    took = time.monotonic() - began
    times = (
        f"first token {statistics.median(result.first):.1f} s, answer {statistics.median(result.whole):.1f} s (medians)"
    )
    print(
        f"{given.chats} chats for {took:.0f} s: {result.finished} answered, {len(result.lost)} lost"
        + (f", {result.refused} refused after SIGTERM" if given.stop_pid else "")
        + f"; {result.tokens} tokens, {result.tokens / took:.1f}/s"
        + (f"; {times}" if result.first else "")
    )
    for reason in result.lost[:5]:
        print(f"  lost: {reason}")
    return bool(result.lost)


if __name__ == "__main__":
    raise SystemExit(main())
