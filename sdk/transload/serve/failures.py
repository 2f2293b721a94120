"""Why an engine ended, as a sentence and the next step: from the last lines of its log and its exit code."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from transload.serve.known import ROWS
from transload.serve.logs import message


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an engine stopped. name: a short word for machines; evidence: the line of the log that says it."""

    name: str
    sentence: str
    next_step: str
    evidence: str = ""


def explain(lines: Sequence[str], code: int | None) -> Failure:
    """Why an engine ended: the first known failure in its last lines, else what its exit code and last error say.

    code: the exit code, negative for a signal, None when it did not end but never became healthy.
    """
    texts = [message(line) for line in lines]
    for row in ROWS:
        for _, text in texts:
            found = row.pattern.search(text)
            if found:
                words = _words(row.name, found)
                return Failure(row.name, row.sentence.format(*words), row.next_step.format(*words), text[:500])
    return _by_code(texts, code)


def _words(name: str, found: re.Match[str]) -> list[str]:
    groups = [g for g in found.groups() if g is not None]
    if name == "kv-too-small" and found.re.groups == 3:
        return [found[1], found[2], f" (at most {found[3]})" if found[3] else ""]
    if name == "group-alignment" and found.re.groups == 3:
        return [found[1], found[2] or "a row-parallel layer", found[3]]
    return [*groups, *["?"] * 3]


def _by_code(texts: Sequence[tuple[str, str]], code: int | None) -> Failure:
    said = next((t for level, t in reversed(texts) if _ERROR.search(t) or level == "ERROR"), "")
    last = f"; its last error: {said.strip()[:300]}" if said else ""
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in {s.value for s in signal.Signals} else str(-code)
        if name == "SIGKILL":
            return Failure(
                "killed",
                f"the engine was killed (SIGKILL){last}",
                "the kernel does that when the machine's RAM is used up (`dmesg | tail`): load with less RAM in use",
            )
        if name == "SIGBUS":
            return Failure(
                "shared-memory", f"the engine died of a bus error{last}", "enlarge /dev/shm (--shm-size=16g)"
            )
        return Failure("signal", f"the engine was ended by {name}{last}", "see the log")
    if code is None:
        return Failure("not-healthy", f"the engine did not become healthy in time{last}", "see the log")
    return Failure("unknown", f"the engine ended with code {code}{last}", "see the log")


_ERROR = re.compile(r"^\s*(?:[\w.]*(?:Error|Exception|Errno)\b.*:|error:)")
