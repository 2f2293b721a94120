"""One model quantized by Transload and by llm-compressor, beside each other: time, memory, and what it costs.

    python examples/quantize_beside.py model.gguf work --peer-python peers/bin/python --windows 32
    python examples/quantize_beside.py folder work --peer-python peers/bin/python --methods gptq awq --json out.json

Both get the same bfloat16 folder, the same windows of text, the same layers, groups and symmetry, and as many threads.
Every run is a process of its own, from the start of Python to the folder on disk, so that imports, reading and writing
count for both; CPU seconds and the largest resident memory (mapped files included) are those that the kernel counts.
Then one program measures the perplexity of all results. Rounding to nearest is measured too, as what both are to
improve.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

HERE = Path(__file__).parent
PEER = "llm-compressor"


@dataclass(slots=True)
class Row:
    """One tool's work. wall and cpu in seconds, memory in GB; increase of the perplexity over the source's."""

    tool: str
    method: str
    wall: float
    cpu: float
    memory: float
    perplexity: float = 0.0
    increase: float = 0.0


def measured(command: list[str], threads: int, log: Path) -> tuple[float, float, float]:
    """Runs a command to its end: seconds on the clock, seconds of CPU, largest resident memory in GB.

    This process imports nothing large: Linux counts what a parent has resident as its child's when it starts.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with log.open("w") as f:
        child = subprocess.Popen(command, env=environment, stdout=f, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{' '.join(command)}\nended with {os.waitstatus_to_exitcode(status)}; the end of {log}:\n"
                 + log.read_text()[-2000:])  # fmt: skip
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e6


def step(name: str, options: argparse.Namespace, *arguments: str) -> list[str]:
    """The command that runs one step of this file."""
    shared = ["--windows", str(options.windows), "--window", str(options.window), "--group", str(options.group)]
    shared += ["--tokens", str(options.tokens)]
    text = [] if options.calibration is None else ["--calibration", str(options.calibration)]
    return [sys.executable, __file__, *arguments, "--step", name, *shared, *text]


def compare(options: argparse.Namespace) -> dict[str, object]:
    """Everything, method by method; prints as it goes."""
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    measured(step("prepare", options, options.model, str(work)), options.threads, work / "prepare.log")
    rows: list[Row] = []
    for method in ["rtn", *options.methods]:
        tools = ["transload"] if method == "rtn" or not options.peer_python else ["transload", PEER]
        for _ in range(options.repeat):
            for tool in tools:
                command = step(f"{method}", options, str(work / "source"), str(work / f"{tool}-{method}"))
                if tool == PEER:
                    out = work / f"{tool}-{method}"
                    shutil.rmtree(out, ignore_errors=True)
                    command = [options.peer_python, str(HERE / "quantize_peer.py"), str(work / "source"),
                               str(work / "windows.pt"), str(out), "--group", str(options.group)]  # fmt: skip
                    command += ["--awq"] if method == "awq" else []
                found = measured(command, options.threads, work / f"{tool}-{method}.log")
                row = next((r for r in rows if (r.tool, r.method) == (tool, method)), None)
                if row is None:
                    rows.append(Row(tool, method, *found))
                elif found[0] < row.wall:  # the quietest of several runs
                    row.wall, row.cpu, row.memory = found
                print(f"{tool} {method}: {found[0]:.0f} s, {found[1]:.0f} s of CPU, {found[2]:.2f} GB", flush=True)
    base = perplexity_of(work / "source", options)
    print(f"source: perplexity {base:.4f}", flush=True)
    for row in rows:
        row.perplexity = perplexity_of(work / f"{row.tool}-{row.method}", options)
        row.increase = row.perplexity - base
    said = {k: getattr(options, k) for k in ("model", "group", "windows", "window", "tokens", "threads", "repeat")}
    return {**said, "source": base, "rows": [asdict(row) for row in rows]}


def perplexity_of(folder: Path, options: argparse.Namespace) -> float:
    """The perplexity of a folder, measured by a process of its own."""
    answer = options.work / "perplexity.json"
    measured(step("perplexity", options, str(folder), str(answer)), options.threads, options.work / "perplexity.log")
    return float(json.loads(answer.read_text()))


def table(found: dict[str, object]) -> str:
    """The rows as text, in Markdown."""
    rows = [Row(**r) for r in found["rows"]]  # type: ignore[attr-defined]
    nearest = next(r.increase for r in rows if r.method == "rtn")
    lines = [
        "| | wall s | CPU s | peak GB | perplexity | increase | of RTN's |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines.append(f"| source | | | | {found['source']:.4f} | | |")
    for r in rows:
        lines.append(f"| {r.tool} {r.method} | {r.wall:.0f} | {r.cpu:.0f} | {r.memory:.2f} | {r.perplexity:.4f} | "
                     f"{r.increase:.4f} | {r.increase / nearest:.2f} |")  # fmt: skip
    for r in rows:
        theirs = next((t for t in rows if t.tool == PEER and t.method == r.method), None)
        if r.tool != PEER and theirs is not None:
            lines.append(f"\n{r.method}: {r.wall / theirs.wall:.2f} of {PEER}'s time on the clock, "
                         f"{r.cpu / theirs.cpu:.2f} of its CPU time, {r.memory / theirs.memory:.2f} of its memory, "
                         f"{r.increase / theirs.increase:.2f} of its increase")  # fmt: skip
    return "\n".join(lines)


def prepare(options: argparse.Namespace) -> None:
    """work/source: the model in bfloat16. work/windows.pt: the calibration windows that Transload will choose."""
    import torch
    from quantize_quality import calibration_text

    import transload
    from transload.quantize.recipe import Calibration
    from transload.quantize.text import windows
    from transload.runtime import tokenizer

    source, text = options.work / "source", options.work / "calibration.txt"
    if not source.exists():
        transload.port(options.model, source, "bf16")
    text.write_text(options.calibration.read_text() if options.calibration else calibration_text(), encoding="utf-8")
    ids, said = windows(text, Calibration(samples=options.windows, tokens=options.window), tokenizer(source))
    torch.save(ids, options.work / "windows.pt")
    print(said)


def ours(options: argparse.Namespace) -> None:
    """Transload's part; the step's name is the method."""
    import transload
    from transload.quantize import Recipe

    scheme = "int4-channel" if options.group < 0 else f"int4-g{options.group}"
    rules = [{"modules": ["*"], "scheme": scheme, "method": options.step}]
    calibration = {"samples": options.windows, "tokens": options.window, "precision": "bfloat16"}
    recipe = Recipe.model_validate({"name": options.step, "rules": rules, "calibration": calibration})
    text = Path(options.model).parent / "calibration.txt"
    transload.quantize(options.model, options.work, recipe, calibration=text, overwrite=True)


def perplexity_step(options: argparse.Namespace) -> None:
    """Writes the perplexity of a folder to a file."""
    from quantize_quality import evaluate

    source = Path(options.model).parent / "source"
    value, _ = evaluate(options.model, options.tokens, options.window, str(source))
    options.work.write_text(json.dumps(value))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer-python", default=os.environ.get("TRANSLOAD_PEER_PYTHON", ""),
                        help="python of an environment with llm-compressor; without it only Transload")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=("gptq", "awq"), default=["gptq"])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--windows", type=int, default=32, help="of calibration text")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window")
    parser.add_argument("--tokens", type=int, default=6000, help="of evaluation text")
    parser.add_argument("--calibration", type=Path, help="a text file; the standard library's source code if left out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--repeat", type=int, default=1, help="runs of each, one after another in turn; the fastest counts"
    )
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        sys.path.insert(0, str(HERE))
        {"prepare": prepare, "perplexity": perplexity_step}.get(options.step, ours)(options)
        return
    found = compare(options)
    print("\n" + table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
