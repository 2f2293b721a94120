"""Perplexity of one model under several recipes, beside the source: what docs/quality.md shows.

    python examples/quantize_quality.py model.gguf work --recipes int4-g128 w4a8-g128 my.yaml

Each recipe is quantized into a folder of its own below `work` (kept, and used again when it is there). The calibration
text is Python's reference manual and the source code of standard library modules; the evaluation text, which
examples/perplexity.py gives, is docstrings of other modules. Everything is deterministic for one version of Python.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).parent))

from perplexity import docstrings, perplexity

import transload
from transload.runtime import tokenizer

CALIBRATION = (
    "wsgiref", "xmlrpc", "curses", "dbm", "turtle.py", "optparse.py", "pdb.py", "imaplib.py", "smtplib.py",
    "mailbox.py", "plistlib.py", "zipapp.py", "ssl.py", "selectors.py", "cmd.py", "code.py", "codeop.py", "colorsys.py",
    "filecmp.py", "fileinput.py", "ftplib.py", "getopt.py", "getpass.py", "glob.py", "graphlib.py", "linecache.py",
    "netrc.py", "ntpath.py", "numbers.py", "poplib.py", "profile.py", "pstats.py", "pyclbr.py", "quopri.py",
    "rlcompleter.py", "runpy.py", "shlex.py", "socketserver.py", "symtable.py", "tabnanny.py", "textwrap.py",
    "trace.py", "tracemalloc.py", "webbrowser.py", "zipimport.py",
)  # fmt: skip
PIECE = 4000  # characters


def calibration_text() -> str:
    """Python's reference manual (what help() shows) and source code of the modules in CALIBRATION, turn by turn."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [
        f
        for name in CALIBRATION
        for f in ([library / name] if name.endswith(".py") else sorted((library / name).glob("*.py")))
    ]
    code = "\n\n".join(f.read_text(encoding="utf-8") for f in files if f.is_file())
    manual = "\n\n".join(topics[name] for name in sorted(topics))
    pieces = range(0, len(manual), PIECE)
    return "\n\n".join(text[start : start + PIECE] for start in pieces for text in (manual, code))


def evaluate(path: str | Path, tokens: int, window: int, source: str) -> tuple[float, float]:
    """Perplexity as stored, and seconds. source: whose tokenizer is used, so that all see the same tokens."""
    ids = tokenizer(source)("\n\n".join(docstrings()), return_tensors="pt")["input_ids"][0][:tokens]
    model = transload.load(path, "cpu")
    start = time.perf_counter()
    return perplexity(model, ids, window), time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("work", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["int4-g128"])
    parser.add_argument("--to", default="transload")
    parser.add_argument("--also", nargs="*", default=[], type=Path, help="folders to evaluate, made by other tools")
    parser.add_argument("--calibration", type=Path, help="a text file; the library's source code if left out")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    text = options.calibration or options.work / "calibration.txt"
    if options.calibration is None:
        text.write_text(calibration_text(), encoding="utf-8")
    known = options.work / "results.json"
    results = json.loads(known.read_text()) if known.is_file() else {}
    key = f"source {options.tokens}"
    if key not in results:
        results[key] = evaluate(options.model, options.tokens, options.window, options.model)
    base = results[key][0]
    print(f"source: perplexity {base:.4f}", flush=True)
    for folder in options.also:
        key = f"{folder.name} {options.tokens}"
        if key not in results:
            results[key] = evaluate(folder, options.tokens, options.window, options.model)
        print(f"{folder.name}: perplexity {results[key][0]:.4f}, +{results[key][0] - base:.4f}", flush=True)
        known.write_text(json.dumps(results, indent=1))
    for recipe in options.recipes:
        name = Path(recipe).stem
        folder = options.work / name
        if not folder.exists():
            cpu = time.process_time()
            report = transload.quantize(options.model, folder, recipe, to=options.to, calibration=text, resume=True)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # of the process so far, in GB
            results[f"quantize {name}"] = report.seconds
            print(f"{name}: {time.process_time() - cpu:.0f} s of CPU, peak memory {peak:.2f} GB", flush=True)
            (options.work / f"{name}.report.json").write_text(json.dumps(report.to_json(), indent=1))
        key = f"{name} {options.tokens}"
        if key not in results:
            results[key] = evaluate(folder, options.tokens, options.window, options.model)
        value, _ = results[key]
        took = results.get(f"quantize {name}", float("nan"))
        print(f"{name}: perplexity {value:.4f}, +{value - base:.4f}, quantized in {took:.0f} s", flush=True)
        known.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
