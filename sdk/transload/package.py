"""Packages that can be called like the function they are named after: transload.plan(...), transload.serve(...).

Python puts a package under its name into the parent when any of its modules is first imported, over a function of the
same name. So the package itself answers the call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    """Calls the attribute that has the package's own name."""

    @property
    def __call__(self) -> Callable[..., Any]:
        """The function, loaded when it is first called."""
        return getattr(self, self.__name__.rpartition(".")[2])  # type: ignore[no-any-return]


def make_callable(package: str) -> None:
    """Makes an imported package call its function of the same name."""
    sys.modules[package].__class__ = _CallablePackage
