"""`transload.serve`: an engine for as long as a `with` block lasts."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from transload.errors import BackendError, ConfigError
from transload.launch import plan_from
from transload.plan.result import Plan
from transload.plan.units import parse_size
from transload.serve.events import Event, Listener
from transload.serve.health import free_port
from transload.serve.prepare import Wishes, serve_starts
from transload.serve.run import Runner, Settings
from transload.serve.starting import Start

log = logging.getLogger("transload.serve")
log.addHandler(logging.NullHandler())  # silent unless the program that uses this configures logging
_LEVELS = {"failed": logging.ERROR, "drift": logging.WARNING, "notice": logging.WARNING, "load": logging.DEBUG}


class Service:
    """Engines that run. Made by `serve`; all methods may be called from any thread."""

    def __init__(self, starts: Sequence[Start], settings: Settings, listener: Listener | None = None) -> None:
        self._starts, self._settings, self._listener = tuple(starts), settings, listener
        self._runners: tuple[Runner, ...] = ()
        self._lock = threading.Lock()

    @property
    def base_urls(self) -> tuple[str, ...]:
        """The OpenAI-compatible base URL of every instance that answers here, ending in /v1."""
        heads = (s.command for s in self._starts if s.head)
        return tuple(c.health_url.removesuffix(c.health_path) + "/v1" for c in heads)

    @property
    def base_url(self) -> str:
        """The base URL of the first instance."""
        return self.base_urls[0]

    @property
    def model(self) -> str:
        """The name that requests give as `model`."""
        return self._starts[0].model

    @property
    def logs(self) -> tuple[Path, ...]:
        """The engines' log files."""
        return tuple(s.log for s in self._starts)

    @property
    def kv_tokens(self) -> int | None:
        """Tokens in the KV caches of all instances, as their engines said; None before they did."""
        found = [r.progress.kv_tokens for r in self._runners if r.begin.head]
        return sum(t for t in found if t is not None) if found and None not in found else None

    def start(self) -> Service:
        """Starts the processes without waiting for them. Raises ConfigError when they were started before."""
        with self._lock:
            if self._runners:
                raise ConfigError("this service was started before; make another one with transload.serve")
            self._runners = tuple(Runner(s, self._settings, self._heard) for s in self._starts)
        for runner in self._runners:
            runner.start()
        return self

    def wait_ready(self, timeout: float | None = None) -> Service:
        """Waits until every instance answers. Raises BackendError with what went wrong, and stops all, otherwise."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for runner in self._runners:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not runner.ready.wait(left):
                self.stop(force=True)
                raise BackendError(f"{runner.begin.name}: not ready after {timeout:g} s; log: {runner.begin.log}")
            if runner.over:
                self.stop(force=True)
                raise BackendError(self._why(runner))
        return self

    def stop(self, force: bool = False) -> int:
        """Lets running requests finish (with force: not), ends all engines. Returns 0 when none had failed, else 1."""
        self.ask_to_stop(force)
        return self.wait() or 0

    def ask_to_stop(self, force: bool = False) -> None:
        """As `stop`, without waiting: for signal handlers. The second time does not wait for requests."""
        for runner in self._runners:
            runner.stop(force)

    def wait(self, timeout: float | None = None) -> int | None:
        """Waits until all engines have ended. Returns 0 when they were asked to, 1 when one failed, None in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for runner in self._runners:
            if not runner.join(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return None
        return int(any(r.failure is not None for r in self._runners))

    def __enter__(self) -> Service:
        try:
            return self.start().wait_ready()
        except BaseException:
            self.stop(force=True)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _heard(self, event: Event) -> None:
        log.log(_LEVELS.get(event.kind, logging.INFO), "%s: %s", event.engine, event.text)
        if self._listener is None:
            return
        try:
            self._listener(event)
        except Exception:  # the thread that reads the engine's output calls this: it must go on
            log.exception("%s: on_event failed for '%s'", event.engine, event.kind)

    @staticmethod
    def _why(runner: Runner) -> str:
        failure = runner.failure
        if failure is None:
            return f"{runner.begin.name}: was stopped before it was ready"
        step = f". Next: {failure.next_step}" if failure.next_step else ""
        return f"{runner.begin.name}: {failure.sentence}{step} (log: {runner.begin.log})"


def serve(
    path: str | Path,
    *,
    plan: Plan | str | Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    engine_python: str | Path | None = None,
    served_name: str | None = None,
    context: str | int = "8k",
    concurrency: int = 16,
    tp: int | None = None,
    kv_cache: str | int | None = None,
    start_timeout: float = 1800.0,
    drain: float = 60.0,
    restarts: int = 0,
    logs: str | Path | None = None,
    unchecked: bool = False,
    arguments: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    on_event: Listener | None = None,
) -> Service:
    """A service that starts in a `with` block, answers inside it at `base_url`, and is drained after it.

    path: a checkpoint that the engine loads as it is. plan: for this machine, a Plan or its file; without it one is
    made from context, concurrency, tp and kv_cache (bytes on each device, "2 GiB"). port: None takes a free one.
    engine_python: the Python with the engine (TRANSLOAD_VLLM_PYTHON, then this environment, by default). start_timeout
    and drain: seconds. restarts: how often in a row a failed engine is started again. logs: a folder. unchecked: start
    even what Transload's table says the engine does not load. arguments, env: more for the engine. on_event: called
    from several threads with every Event, which the logger "transload.serve" gets too.

    Everything is checked here; nothing is started before the block. Raises ConfigError, Unsupported, NoBackend,
    DoesNotFit, FormatError.

    >>> with serve("qwen-vllm-cpu", kv_cache="1 GiB") as service:  # doctest: +SKIP
    ...     OpenAI(base_url=service.base_url, api_key="-").chat.completions.create(model=service.model, messages=...)
    """
    wishes = Wishes(
        host=host,
        port=port if port is not None else free_port(host if host not in ("0.0.0.0", "::") else ""),
        python=None if engine_python is None else Path(engine_python),
        served_name=served_name,
        context=context,
        concurrency=concurrency,
        tp=tp,
        kv_cache=None if kv_cache is None else parse_size(kv_cache),
        drain=drain,
        unchecked=unchecked,
        arguments=tuple(arguments),
        env=dict(env or {}),
    )
    given = plan if plan is None or isinstance(plan, Plan) else plan_from(plan)
    starts = serve_starts(Path(path), given, wishes, log_folder(logs))
    return Service(starts, Settings(start=start_timeout, drain=drain, restarts=restarts), on_event)


def log_folder(given: str | Path | None) -> Path:
    """The folder for an engine's logs: the given one, else a new one under the user's state directory."""
    if given is not None:
        return Path(given)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "transload" / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")
