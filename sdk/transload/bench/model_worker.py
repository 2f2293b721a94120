"""One engine with its model in a process of its own: `python model_worker.py`, one JSON line in, one out.

{"load": name, "job": {...}, "clock": "wall"}
                                         -> {"seconds": 1.2, "versions": {}, "detail": "...", "weight_bytes": 100}
{"ids": [...], "text": "...", "new": 128, "clock": "wall"}
                                         -> {"prompt": 0.5, "decode": 4.0, "tokens": [...], "peak": bytes}

Either may answer {"reason": why not}. Between two lines the process waits for its standard input and does nothing.
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
    here = Path(__file__).parent
    peers, memory = _load(here / "model_peers.py"), _load(here.parent / "memory.py")
    engine: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "load" in request:
                engine, answer = _loaded(peers, request)
            else:
                answer = {**_answered(engine, request), "peak": memory.peak_memory()}
                if answer["tokens"] is None:
                    answer["tokens"] = engine.tokens(request["ids"], request["new"])
        except Exception as e:
            answer = {"reason": peers.first_line(e)}
        replies.write(json.dumps(answer) + "\n")


def _loaded(peers: Any, request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(engine, answer). Importing the library does not count as loading."""
    found = peers.contender(request["load"])
    if importlib.util.find_spec(found.module) is None:
        raise peers.LeftOut(f"not installed (--env PYTHON names an environment that has '{found.module}')")
    importlib.import_module(found.module)
    if found.own:
        importlib.import_module("transload.bench.model_torch")
    now = time.process_time if request["clock"] == "cpu" else time.perf_counter
    start = now()
    engine = found.load(peers.Job(**request["job"]))
    seconds = now() - start
    described = {"versions": engine.versions, "detail": engine.detail, "weight_bytes": engine.weight_bytes}
    return engine, {"seconds": seconds, **described}


def _answered(engine: Any, request: dict[str, Any]) -> dict[str, Any]:
    """One prompt and its answer. Processor time is not split by the engines: it comes from two answers."""
    ids, text, new = request["ids"], request["text"], request["new"]
    if request["clock"] == "wall":
        answer = engine.answer(ids, text, new)
        return {"prompt": answer.prompt_seconds, "decode": answer.decode_seconds, "tokens": answer.tokens}
    start = time.process_time()
    engine.answer(ids, text, 1)
    middle = time.process_time()
    answer = engine.answer(ids, text, new)
    prompt, both = middle - start, time.process_time() - middle
    return {"prompt": prompt, "decode": max(both - prompt, 1e-9), "tokens": answer.tokens}


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"transload_bench_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
