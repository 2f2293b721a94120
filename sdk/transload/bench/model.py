"""The model benchmark: one checkpoint in several engines, a process each, one at work at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from transload import checkpoint as checkpoints
from transload.bench.limits import read_rate
from transload.bench.model_bytes import stored_bytes
from transload.bench.model_engines import Running, Say, Settings, asked, load_all, read_once, watched
from transload.bench.model_prompt import Prompt, degenerate, prompt_of, shared
from transload.bench.timing import ratio
from transload.checkpoint import Checkpoint
from transload.errors import ConfigError, Unsupported
from transload.runtime import tokenizer
from transload.runtime.loading import model_class, model_config

REFERENCE = "transformers fp32"  # whose tokens the others are compared with
PAUSE = 0.1  # seconds between two turns, in which threads that spin after their work go to sleep
_BUSY = 0.02  # of a core: what an idle process may use before it is named


@dataclass(frozen=True, slots=True)
class ModelRow:
    """One engine. Speeds are tokens per second, medians over rounds; the first token counts to the prompt.

    cold_first_token: of the first prompt after loading. read: weight bytes over time, as a fraction of the measured
    read bandwidth. same_tokens: of `tokens`, how many at the beginning are those of REFERENCE. idle: cores used while
    others worked. faster: for each of our schemes, how many times it is faster in (prompt, decoding).
    """

    name: str
    threads: int
    clock: str
    prompt_tokens: int
    decode_tokens: int
    prompt_tokens_per_second: float
    tokens_per_second: float
    first_token_seconds: float
    cold_first_token_seconds: float
    load_seconds: float
    peak_bytes: int
    weight_bytes: int | None
    read: float | None
    same_tokens: int | None
    degenerate: str | None
    idle: float
    detail: str
    versions: dict[str, str]
    prompt_seconds: list[float] = field(default_factory=list)
    decode_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    faster: dict[str, tuple[float, float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row as plain data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Result:
    """All rows, the engines that are missing and why, and the best read bandwidth measured between the turns."""

    rows: list[ModelRow]
    absent: dict[str, str]
    read_bytes_per_second: float | None


def run(path: Path, settings: Settings, say: Say) -> Result:
    """Loads everything that can be loaded, then takes turns. `say` is told what is going on.

    Raises FormatError or ConfigError before anything is started when the path holds no language model, or the prompt
    does not fit its context.
    """
    checkpoint = checkpoints.open(path, "native")
    _check_model(checkpoint, settings)
    prompt = prompt_of(tokenizer(path), settings.text, settings.prompt_tokens)
    read_once(checkpoint)
    absent: dict[str, str] = {}
    with ExitStack() as stack:
        running = list(load_all(checkpoint, settings, stack, absent, say))
        if not running:
            raise ConfigError("no engine could load the model: " + _listed(absent))
        read = _take_turns(running, prompt, settings, absent, say)
    if not running:
        raise ConfigError("every engine failed: " + _listed(absent))
    rows = [_row(r, running, settings, read, stored_bytes(checkpoint)) for r in running]
    return Result(rows, absent, read)


def _listed(absent: dict[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in absent.items())


def _check_model(checkpoint: Checkpoint, settings: Settings) -> None:
    config = model_config(checkpoint, trust_remote_code=False)
    kind = model_class(config, checkpoint.path)
    if config.is_encoder_decoder or not kind.can_generate():
        raise Unsupported(f"{checkpoint.path}: {kind.__name__} does not continue a text, so there is nothing to time")
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    wanted = settings.prompt_tokens + settings.decode_tokens + 1
    if limit is not None and wanted > limit:
        raise ConfigError(
            f"{checkpoint.path}: {settings.prompt_tokens} prompt tokens and {settings.decode_tokens} more are {wanted} "
            f"with the first, and the model's context holds {limit}: ask for fewer"
        )


def _take_turns(
    running: list[Running], prompt: Prompt, settings: Settings, absent: dict[str, str], say: Say
) -> float | None:
    """Warms everybody up, then measures in rounds, every other one backwards. Returns the best read bandwidth."""
    request = {"ids": prompt.ids, "text": prompt.text, "new": settings.decode_tokens + 1, "clock": settings.clock}
    rates = []
    for turn in range(settings.rounds + 1):
        if settings.limits:
            rates.append(read_rate(settings.threads, settings.clock))
        for r in list(running) if turn % 2 == 0 else list(reversed(running)):
            say(f"{'warming up' if turn == 0 else f'round {turn} of {settings.rounds}'}: {r.name}")
            time.sleep(PAUSE)
            with watched([other for other in running if other is not r]):
                answer = asked(r.worker, request)
            if "reason" in answer:
                absent[r.name] = answer["reason"]
                running.remove(r)
                r.worker.close()
                continue
            r.peak, r.tokens = answer["peak"], answer["tokens"]
            if turn == 0:
                r.cold = answer["prompt"]
            else:
                r.prompts.append(answer["prompt"])
                r.decodes.append(answer["decode"])
    return max(rates, default=None)


def _row(r: Running, all: Sequence[Running], settings: Settings, read: float | None, stored: int) -> ModelRow:
    prompt, decode = median(r.prompts), median(r.decodes)
    weights = r.loaded["weight_bytes"] or (stored if r.contender.reads_gguf else None)
    speed = settings.decode_tokens / decode
    reference = next((other.tokens for other in all if other.name == REFERENCE), None)
    ours = [other for other in all if other.name.startswith("transload") and other is not r]
    return ModelRow(
        name=r.name,
        threads=settings.threads,
        clock=settings.clock,
        prompt_tokens=settings.prompt_tokens,
        decode_tokens=settings.decode_tokens,
        prompt_tokens_per_second=settings.prompt_tokens / prompt,
        tokens_per_second=speed,
        first_token_seconds=prompt,
        cold_first_token_seconds=r.cold,
        load_seconds=float(r.loaded["seconds"]),
        peak_bytes=r.peak,
        weight_bytes=weights,
        read=weights * speed / read if weights and read else None,
        same_tokens=shared(r.tokens, reference) if reference and r.tokens else None,
        degenerate=degenerate(r.tokens),
        idle=r.idle / r.waited if r.waited else 0.0,
        detail=r.loaded["detail"],
        versions=r.loaded["versions"],
        prompt_seconds=r.prompts,
        decode_seconds=r.decodes,
        tokens=r.tokens,
        faster={o.name: (ratio(r.prompts, o.prompts), ratio(r.decodes, o.decodes)) for o in ours},
    )


def busy(rows: Sequence[ModelRow]) -> list[ModelRow]:
    """Those whose processes did not rest while others were measured."""
    return [r for r in rows if r.idle > _BUSY]
