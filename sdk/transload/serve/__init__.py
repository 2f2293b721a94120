"""Start an engine from a plan, watch it, stop it.

    import transload
    with transload.serve("qwen-vllm-cpu") as service:
        print(service.base_url)          # http://127.0.0.1:41234/v1, for any OpenAI client

The package itself can be called, so that `transload.serve(...)` works whether or not its modules are imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transload.serve.events import Event as Event
    from transload.serve.service import Service as Service
    from transload.serve.service import serve as serve

_HOMES = {
    "Event": "transload.serve.events",
    "Service": "transload.serve.service",
    "serve": "transload.serve.service",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'transload.serve' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


class _Serving(ModuleType):
    """This package, callable."""

    @property
    def __call__(self) -> Callable[..., Service]:
        """`transload.serve.service.serve`."""
        from transload.serve.service import serve

        return serve


sys.modules[__name__].__class__ = _Serving
