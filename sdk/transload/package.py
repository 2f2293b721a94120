"""Packages whose names load on first use, and that can be called like the function they are named after.

Python puts a package under its name into the parent when any of its modules is first imported, over a function of the
same name. So the package itself answers the call: transload.plan(...), transload.serve(...).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import Any


def lazy(package: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """A package's `__getattr__` (PEP 562). homes: public name -> the module that has it."""

    def load(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(homes[name]), name)

    return load


class _CallablePackage(ModuleType):
    """Calls the attribute that has the package's own name."""

    @property
    def __call__(self) -> Callable[..., Any]:
        """The function, loaded when it is first called."""
        return getattr(self, self.__name__.rpartition(".")[2])  # type: ignore[no-any-return]


def make_callable(package: str) -> None:
    """Makes an imported package call its function of the same name."""
    sys.modules[package].__class__ = _CallablePackage
