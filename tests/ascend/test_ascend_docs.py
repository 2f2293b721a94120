"""docs/ascend.md names tests and limits that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_exists() -> None:
    sources = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"\btest_\w+(?!\w|\.py)", re.sub(r"\btest_\w+\.py", "", PAGE)))
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in sources} == set()


def test_every_file_that_the_page_names_exists() -> None:
    files = set(re.findall(r"\btest_\w+\.py", PAGE))
    assert {name for name in files if not list((ROOT / "tests").rglob(name))} == set()
    links = set(re.findall(r"\]\(([\w./]+)\)", PAGE))
    assert {link for link in links if not (ROOT / "docs" / link).exists()} == set()


def test_the_page_of_limits_is_what_the_data_says_and_every_limit_on_it_has_a_test() -> None:
    from test_ascend_limits import TABLES as TESTED

    from transload_ascend.limits.__main__ import TABLES, page

    assert (ROOT / "docs" / "ascend-limits.md").read_text(encoding="utf-8") == page()
    assert {id(limits) for _, limits in TABLES} == {id(table.limits) for table in TESTED}
    assert sum(len(limits) for _, limits in TABLES) == sum(len(table.bad) for table in TESTED) > 130


def test_every_limit_and_kernel_that_the_page_names_exists() -> None:
    limits = "\n".join(f.read_text(encoding="utf-8") for f in (ROOT / "backends/transload_ascend/limits").glob("*.py"))
    for name in ("nz-group-size", "x-2d", "inner-size", "width", "swiglu-n", "swiglu-k"):
        assert f'Limit("{name}"' in limits
        assert f"`{name}`" in PAGE
    from transload_ascend import backend

    assert {kernel.name for kernel in backend.kernels} == set(
        re.findall(r"\bascend-[\w-]*[aw]\d\w*(?:-nz|-wide)?", PAGE)
    )
    assert len(re.findall(r"^\| \d+ \|", PAGE, re.M)) == 22
