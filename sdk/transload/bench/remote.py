"""The benchmark's side of a worker in another environment: its peers as contenders."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transload.bench.peers import Data
from transload.bench.timing import Clock
from transload.errors import ConfigError

ERROR_ROWS = 16  # rows whose error is computed


class Environment:
    """Another Python with other libraries, or a process of this one. Use as a context manager.

    worker: the file of this folder that it runs. variables: environment variables on top of this process's.
    """

    def __init__(
        self, python: Path, worker: str = "worker.py", variables: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        # A pool that spins after its work is done would slow down whoever has the next turn.
        environment = {**os.environ, "KMP_BLOCKTIME": "1", "PYTHONPATH": "", **variables}
        self.python = python
        try:
            self._process = subprocess.Popen(
                [str(python), str(Path(__file__).with_name(worker))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=environment,
            )
        except OSError as e:
            raise ConfigError(f"peer environment {python}: {e}") from e

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The worker's process."""
        return self._process.pid

    def close(self) -> None:
        """Ends the worker; a second time does nothing."""
        self._process.terminate()
        self._process.wait()

    def load(self, data: Data, folder: Path, clock: Clock = "wall") -> tuple[list[RemotePeer], dict[str, str]]:
        """(contenders, reasons) for one case."""
        path = folder / "case.npz"
        counts: dict[str, Any] = {} if data.counts is None else {"counts": data.counts.numpy()}
        np.savez(path, codes=data.codes.numpy(), scales=data.scales.numpy(), x=data.x.numpy(), **counts)
        answer = self.ask({"load": str(path), "group": data.group, "threads": data.threads})
        return [RemotePeer(name, self, clock) for name in answer["ready"]], answer["reasons"]

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request and its answer. Raises ConfigError when the worker has died."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise ConfigError(f"peer environment {self.python} stopped with exit code {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


class RemotePeer:
    """One peer of another environment as a contender; it takes its own time, without the pipe's."""

    def __init__(self, name: str, environment: Environment, clock: Clock) -> None:
        self.name, self._clock = name, clock
        self._environment = environment

    def seconds(self, calls: int) -> float:
        """Time of that many calls, measured where they run."""
        request = {"time": self.name, "calls": calls, "clock": self._clock}
        return float(self._environment.ask(request)["seconds"])

    def output(self) -> Tensor:
        """The first rows of the product."""
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "y.npy")
            self._environment.ask({"output": self.name, "rows": ERROR_ROWS, "path": path})
            return torch.from_numpy(np.load(path, allow_pickle=False))
