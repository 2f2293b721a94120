"""The engines of the model benchmark as processes: started, loaded, and watched while they should rest."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from transload.bench.model_peers import CONTENDERS, Contender, Job
from transload.bench.remote import Environment
from transload.bench.timing import Clock
from transload.checkpoint import Checkpoint
from transload.errors import ConfigError
from transload.hal import find_device

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured. threads: for everyone. only: names of contenders, all when empty. onnx: for genai."""

    threads: int
    prompt_tokens: int = 512
    decode_tokens: int = 128
    rounds: int = 5
    clock: Clock = "wall"
    environments: tuple[Path, ...] = ()
    only: tuple[str, ...] = ()
    onnx: Path | None = None
    text: str = ""
    limits: bool = True


@dataclass(slots=True)
class Running:
    """A process with a loaded model, and what it has done so far."""

    contender: Contender
    worker: Environment
    loaded: dict[str, Any]
    prompts: list[float] = field(default_factory=list)
    decodes: list[float] = field(default_factory=list)
    cold: float = 0.0
    peak: int = 0
    tokens: list[int] = field(default_factory=list)
    idle: float = 0.0  # processor seconds while others worked
    waited: float = 0.0

    @property
    def name(self) -> str:
        """As the table shows it."""
        return self.contender.name


def load_all(
    checkpoint: Checkpoint, settings: Settings, stack: ExitStack, absent: dict[str, str], say: Say
) -> Iterator[Running]:
    """Every engine that can load the checkpoint, one after the other; `absent` gets the reasons of the others.

    Raises ConfigError for names and environments that do not exist.
    """
    unknown = set(settings.only) - {c.name for c in CONTENDERS}
    if unknown:
        raise ConfigError(f"no contender '{min(unknown)}': there are {', '.join(c.name for c in CONTENDERS)}")
    context = -(-(settings.prompt_tokens + settings.decode_tokens + 1) // 256) * 256
    job = asdict(Job(str(checkpoint.path), str(settings.onnx or ""), settings.threads, context))
    for contender in CONTENDERS:
        if settings.only and contender.name not in settings.only:
            continue
        reason = _refuses(contender, checkpoint)
        for python in (Path(sys.executable), *(() if contender.own else settings.environments)):
            if reason is not None:
                break
            say(f"loading {contender.name}")
            worker = stack.enter_context(Environment(python, "model_worker.py", _environment(settings.threads)))
            answer = asked(worker, {"load": contender.name, "job": job, "clock": settings.clock})
            if "reason" not in answer:
                absent.pop(contender.name, None)
                yield Running(contender, worker, answer)
                break
            if contender.name not in absent or not answer["reason"].startswith("not installed"):
                absent[contender.name] = answer["reason"]
            worker.close()
        if reason is not None:
            absent[contender.name] = reason


def asked(worker: Environment, request: dict[str, Any]) -> dict[str, Any]:
    """The worker's answer; a reason when it has died, for lack of memory, say."""
    try:
        return worker.ask(request)
    except ConfigError as e:
        return {"reason": str(e)}


def read_once(checkpoint: Checkpoint) -> None:
    """Brings the files into the system's cache where they fit, so that nobody pays for being the first to load."""
    files = {tensor.file for tensor in checkpoint.source.infos.values()}
    if 2 * sum(file.stat().st_size for file in files) > find_device("cpu")[1].free:
        return
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def _refuses(contender: Contender, checkpoint: Checkpoint) -> str | None:
    """Why there is no use in starting a process."""
    if contender.reads_gguf and (checkpoint.source.container != "gguf" or not checkpoint.path.is_file()):
        return f"it reads one GGUF file: `transload port {checkpoint.path.name} ... --to llama.cpp` makes one"
    if contender.name.startswith("transformers"):
        width = 4 if contender.name.endswith("fp32") else 2
        numbers = sum(prod(e.shape) for e in checkpoint.entries.values())
        free = find_device("cpu")[1].free
        if numbers * width * 1.1 > free:
            return f"its floats take {numbers * width / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
    return None


def _environment(threads: int) -> dict[str, str]:
    """No accelerator, one pool of threads of the asked size, and no threads that spin for long."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "KMP_BLOCKTIME": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def watched(idle: Sequence[Running]) -> Iterator[None]:
    """Adds what processes use while they should not."""
    before, start = [_processor_seconds(r.worker.pid) for r in idle], time.perf_counter()
    yield
    for r, seconds in zip(idle, before, strict=True):
        r.idle += _processor_seconds(r.worker.pid) - seconds
        r.waited += time.perf_counter() - start


def _processor_seconds(pid: int) -> float:
    """User and system time of a process and its threads; 0 where the system does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
