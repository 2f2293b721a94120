"""One engine process kept: started, watched until it answers and after, drained when asked, restarted when wanted."""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass

from transload.errors import ConfigError, TransloadError
from transload.serve.events import Event, Kind, Listener
from transload.serve.failures import Failure, explain
from transload.serve.health import healthy, running_requests
from transload.serve.logs import Progress, advance
from transload.serve.neighbours import Neighbours
from transload.serve.process import Child
from transload.serve.starting import Start

_TICK = 0.2  # seconds between looks at the process
_GRACE = 20.0  # seconds after the drain for an engine to end its workers


@dataclass(frozen=True, slots=True)
class Settings:
    """Times in seconds. start: until healthy. drain: for running requests when asked to stop. restarts: in a row, 0 to
    report a failure at once; an engine that was healthy for `steady` starts the count again. watch_port: where the
    head of an engine over several nodes listens for the others, 0 for nowhere.
    """

    start: float = 1800.0
    drain: float = 60.0
    restarts: int = 0
    first_delay: float = 2.0
    longest_delay: float = 60.0
    steady: float = 600.0
    health_every: float = 5.0
    unresponsive: float = 120.0
    watch_port: int = 29600


class Runner:
    """Keeps one process of an engine, in a thread. `failure` tells why it ended, None when it was asked to."""

    def __init__(self, start: Start, settings: Settings, listener: Listener) -> None:
        self.begin, self._settings, self._listener = start, settings, listener
        self.ready = threading.Event()
        self.failure: Failure | None = None
        self.over = False
        self.progress = Progress()
        self._asked, self._force = threading.Event(), threading.Event()
        self._neighbours = Neighbours(start, self._tell)
        self._thread = threading.Thread(target=self._run, name=f"serve {start.name}", daemon=True)

    def start(self) -> None:
        """Starts the thread, which starts the process."""
        self._thread.start()

    def join(self, timeout: float | None = None) -> bool:
        """Waits for the end. Returns False when the time is over before."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stop(self, force: bool = False) -> None:
        """Asks the engine to finish its requests and end; with force, or the second time, at once."""
        if force or self._asked.is_set():
            self._force.set()
        self._asked.set()

    def _run(self) -> None:
        """Until the engine was stopped, or failed as often as it may."""
        try:
            if self.begin.log.exists():
                self.begin.log.replace(self.begin.log.with_suffix(".log.old"))
            self._neighbours.join(self._settings.watch_port)
            self._attempts()
        except (TransloadError, OSError) as error:
            self.failure = Failure("not-started", str(error), "")
            self._say_failed(self.failure)
        finally:
            self.over = True
            self.ready.set()  # nobody waits for an engine that has ended
            self._neighbours.close()
            self._tell("stopped", "stopped", code=0 if self.failure is None else 1)

    def _attempts(self) -> None:
        attempt = 0
        while not self._asked.is_set():
            began = time.monotonic()
            self.failure = self._once()
            if self.failure is None:
                return
            self.ready.clear()
            self._say_failed(self.failure)
            attempt = 0 if time.monotonic() - began > self._settings.steady else attempt
            if attempt >= self._settings.restarts:
                return
            delay = min(self._settings.first_delay * 2**attempt, self._settings.longest_delay)
            attempt += 1
            self._tell(
                "restarting", f"starting again in {delay:g} s ({attempt} of {self._settings.restarts})", delay=delay
            )
            self.failure = None
            if self._asked.wait(delay):
                return
            self._neighbours.await_return(self._asked)
        self.failure = None

    def _once(self) -> Failure | None:
        """One life of the process. Returns None when it was asked to stop."""
        self.progress = Progress()
        self._neighbours.begin()
        failure = self._set_up()
        if failure is not None:
            return failure
        child = Child(self.begin.argv, self.begin.env, self.begin.log, self._line)
        self._tell(
            "starting",
            f"started (process {child.pid}), log in {self.begin.log}",
            pid=child.pid,
            log=str(self.begin.log),
        )
        try:
            failure = self._until_over(child)
            if failure is None:
                self._drain(child)
        except BaseException:
            child.terminate()
            raise
        finally:
            child.end(0)
        return failure

    def _set_up(self) -> Failure | None:
        for line in self.begin.setup:
            try:
                done = subprocess.run(
                    line, env=dict(self.begin.env), capture_output=True, text=True, timeout=300, check=False,
                    stdin=subprocess.DEVNULL,
                )  # fmt: skip
            except (OSError, subprocess.TimeoutExpired) as error:
                return Failure("setup", f"{' '.join(line[:3])}: {error}", "see the log")
            if done.returncode:
                return explain((done.stdout + done.stderr).splitlines(), done.returncode)
        return None

    def _until_over(self, child: Child) -> Failure | None:
        """Watches until the engine ends (why), or a stop is asked for (None)."""
        settings, asked = self._settings, 0.0
        answered: float | None = None
        while not self._asked.wait(_TICK):
            code = child.poll()
            if code is not None:
                child.end(0)  # the reader has seen everything then
                return self._neighbours.blame(explain(child.recent(), code))
            trouble = self._neighbours.trouble
            if trouble is not None:
                if trouble.name == "peer-leaving":
                    self._drain(child)  # that node waits for it
                child.terminate()
                child.end(2.0)
                return trouble
            now = time.monotonic()
            if now - asked < (settings.health_every if answered else 0.5):
                continue
            up = healthy(self.begin.command.health_url, min(10.0, settings.health_every * 2))
            asked = time.monotonic()
            if up and answered is None:
                self._became_ready(asked - child.started)
            if up:
                answered = asked
            elif answered is None and now - child.started > settings.start:
                return explain(child.recent(), None)
            elif answered is not None and asked - answered > settings.unresponsive and self.begin.head:
                return Failure(
                    "unresponsive",
                    f"the engine has not answered {self.begin.command.health_url} for {settings.unresponsive:g} s",
                    "see the log; --restarts starts it again by itself",
                )
        return None

    def _became_ready(self, seconds: float) -> None:
        command = self.begin.command
        url = command.health_url.removesuffix(command.health_path) + "/v1"
        self._neighbours.say("ready")
        self._compare()
        own = f"ready after {seconds:.0f} s: {url}, model {self.begin.model}"
        text = own if self.begin.head else f"ready: the head answers at {url}"
        self._tell("ready", text, url=url, model=self.begin.model, seconds=round(seconds, 1), log=str(self.begin.log))
        self.ready.set()

    def _compare(self) -> None:
        """Says how the engine's KV cache differs from the plan's."""
        measured, planned = self.progress.kv_tokens, self.begin.kv_tokens
        if measured is None or planned is None:
            return
        if measured == planned:
            self._tell("cache", f"KV cache of {measured:,} tokens, as planned", kv_tokens=measured, planned=planned)
            return
        difference = measured / planned - 1
        self._tell(
            "drift",
            f"KV cache of {measured:,} tokens, {difference:+.1%} from the plan's {planned:,}{self._offer()}",
            kv_tokens=measured,
            planned=planned,
            difference=round(difference, 4),
            log=str(self.begin.log),
        )

    def _offer(self) -> str:
        """How to plan with what this start measured, where its log has something to measure by."""
        from transload.plan.calibrate import read_log

        try:
            read_log(self.begin.log)
        except ConfigError:
            return "; its log has no numbers that `transload plan calibrate` could use"
        command = f"transload plan calibrate {self.begin.log} --platform {self.begin.platform} -o constants.yaml"
        return f"; to plan with what this start measured: {command}, then transload plan --constants constants.yaml"

    def _drain(self, child: Child) -> None:
        """Lets running requests finish. A node without the API waits for the head to do that first."""
        deadline = time.monotonic() + self._settings.drain + _GRACE
        self._neighbours.say("leaving")
        running = self.progress.running
        note = f"stopping: no new requests, up to {self._settings.drain:g} s for those that run"
        self._tell("draining", note, running=running)
        if not self.begin.head and self._neighbours.seen:
            while time.monotonic() < deadline and not self._force.is_set() and child.poll() is None:
                if self._neighbours.head_left.wait(_TICK):
                    deadline = time.monotonic() + _GRACE / 4  # nothing is left to finish
                    break
        if self.begin.head and not self.begin.drains:
            self._await_idle(child, deadline - _GRACE)
        child.terminate()
        while time.monotonic() < deadline and not self._force.is_set() and child.poll() is None:
            self._force.wait(_TICK)

    def _await_idle(self, child: Child, deadline: float) -> None:
        """For an engine that would drop running requests when it is asked to end: waits until it has none."""
        command = self.begin.command
        page = command.health_url.removesuffix(command.health_path) + "/metrics"
        while time.monotonic() < deadline and not self._force.is_set() and child.poll() is None:
            if not running_requests(page, 5.0):
                return
            self._force.wait(_TICK)

    def _line(self, text: str) -> None:
        """Called with every line of the engine's output."""
        before, self.progress = self.progress, advance(self.progress, text)
        now = self.progress
        if now.fraction is not None and (now.fraction, now.stage) != (before.fraction, before.stage):
            self._tell("loading", f"{now.stage}: {now.fraction:.0%}", fraction=now.fraction, stage=now.stage)
        elif now.stage != before.stage:
            self._tell("stage", now.stage)
        if now.kv_tokens != before.kv_tokens and now.kv_tokens is not None and self.begin.kv_tokens is None:
            self._tell("cache", f"KV cache of {now.kv_tokens:,} tokens", kv_tokens=now.kv_tokens)
        loads = (now.running, now.waiting, now.tokens_per_second)
        if loads != (before.running, before.waiting, before.tokens_per_second):
            self._tell(
                "load",
                f"{now.running} running, {now.waiting} waiting, {now.tokens_per_second:.1f} tokens/s",
                running=now.running, waiting=now.waiting, tokens_per_second=now.tokens_per_second,
            )  # fmt: skip

    def _say_failed(self, failure: Failure) -> None:
        if failure.name == "peer-leaving" or not failure.name.startswith("peer-"):
            self._neighbours.say("failed", failure.sentence)
        step = f" Next: {failure.next_step}." if failure.next_step else ""
        data = {"failure": failure.name, "next_step": failure.next_step, "evidence": failure.evidence}
        self._tell("failed", f"{failure.sentence}.{step}", **data, log=str(self.begin.log))

    def _tell(self, kind: Kind, text: str, **data: str | int | float | bool) -> None:
        self._listener(Event(kind, self.begin.name, text, data))
