"""Runs the peers of another environment for the benchmark: `python worker.py`, one JSON line in, one out.

{"load": "case.npz", "group": 128, "threads": 2}  -> {"ready": [names], "reasons": {name: why}}
{"time": name, "calls": 10, "clock": "wall"}                       -> {"seconds": 0.01}
{"output": name, "rows": 16, "path": "y.npy"}     -> {"path": "y.npy"}
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Answers requests until standard input ends. What libraries print goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    del sys.path[0]  # this folder: its files must not stand before other packages' modules
    import numpy as np
    import torch

    peers = _load(Path(__file__).with_name("peers.py"))
    calls: dict[str, Any] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "load" in request:
            torch.set_num_threads(request["threads"])
            arrays = np.load(request["load"], allow_pickle=False)
            tensors = [torch.from_numpy(arrays[name]) for name in ("codes", "scales", "x")]
            counts = torch.from_numpy(arrays["counts"]) if "counts" in arrays else None
            data = peers.Data(*tensors, request["group"], request["threads"], counts)
            calls, reasons = peers.prepared(data)
            answer: dict[str, Any] = {"ready": list(calls), "reasons": reasons}
        elif "time" in request:
            call = calls[request["time"]]
            now = time.process_time if request["clock"] == "cpu" else time.perf_counter
            start = now()
            for _ in range(request["calls"]):
                call()
            answer = {"seconds": now() - start}
        else:
            np.save(request["path"], calls[request["output"]]()[: request["rows"]].float().numpy())
            answer = {"path": request["path"]}
        replies.write(json.dumps(answer) + "\n")


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("transload_bench_peers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
