"""Plans and renders every example again and compares it with what is kept: python examples/launch/golden.py [--update]

Runs each folder's command.sh, in this process, with its output in a scratch folder. Exit status 1 when something
differs; --update replaces what is kept. A better estimate in the planner changes plan.json and comments, so the test
beside this renders the kept plan again, to the byte, and of a new plan expects the same engines on the same devices.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from transload.cli import app

HERE = Path(__file__).resolve().parent
RENDERED = "rendered"


def examples() -> list[Path]:
    """The folders of all examples."""
    return sorted(script.parent for script in HERE.glob("*/command.sh"))


def commands(example: Path) -> list[list[str]]:
    """The transload commands of an example as arguments, its own defaults in place of variables."""
    text = (example / "command.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    text = re.sub(r"\$\{MODEL:-([^}]*)\}", r"\1", text)
    return [shlex.split(line)[1:] for line in text.splitlines() if line.startswith("transload ")]


def rendered(example: Path, scratch: Path, plan_again: bool = True) -> dict[str, str]:
    """What the example's commands write, by file name; without the first, they render the plan that is kept."""
    work = scratch / example.name
    work.mkdir(parents=True)
    if not plan_again:
        shutil.copy(example / RENDERED / "plan.json", work / "plan.json")
    with _inside(example), contextlib.redirect_stdout(io.StringIO()):
        for argv in commands(example)[0 if plan_again else 1 :]:
            moved = [str(work / word) if word in ("plan.json", RENDERED) else word for word in argv]
            app(moved, standalone_mode=False)
    root = work / RENDERED
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def kept(example: Path) -> dict[str, str]:
    """What is in git."""
    root = example / RENDERED
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def difference(old: dict[str, str], new: dict[str, str], limit: int = 60) -> list[str]:
    """The first lines of a unified difference; empty when both are equal."""
    lines: list[str] = []
    for name in sorted({*old, *new}):
        a, b = old.get(name, "").splitlines(), new.get(name, "").splitlines()
        lines += difflib.unified_diff(a, b, f"kept/{name}", f"rendered/{name}", lineterm="", n=1)
    return lines[:limit]


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> int:
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for example in examples():
            new = rendered(example, Path(scratch))
            lines = difference(kept(example), new)
            print(f"{example.name}: {'differs' if lines else 'as kept'}")
            if lines and "--update" in sys.argv:
                shutil.rmtree(example / RENDERED, ignore_errors=True)
                shutil.copytree(Path(scratch) / example.name / RENDERED, example / RENDERED)
            elif lines:
                print("\n".join(lines))
                wrong += 1
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
