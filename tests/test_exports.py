"""The public names: all of them load, and the list is complete."""

from __future__ import annotations

import ast
from pathlib import Path

import transload
from transload import errors


def test_every_public_name_loads() -> None:
    for name in transload.__all__:
        assert getattr(transload, name) is not None


def test_type_checkers_see_what_is_there_at_run_time() -> None:
    tree = ast.parse(Path(transload.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(transload.__all__)


def test_every_error_is_a_transload_error() -> None:
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    assert len(classes) > 5
    assert all(issubclass(c, errors.TransloadError) for c in classes)


def test_the_error_tree_in_the_docstring_is_complete() -> None:
    names = [n for n, c in vars(errors).items() if isinstance(c, type)]
    assert all(name in (errors.__doc__ or "") for name in names)
