"""Start an engine from a plan, watch it, stop it.

    import transload
    with transload.serve("qwen-vllm-cpu") as service:
        print(service.base_url)          # http://127.0.0.1:41234/v1, for any OpenAI client

The package itself can be called, so that `transload.serve(...)` works whether or not its modules are imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transload.package import lazy, make_callable

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
__getattr__ = lazy(__name__, _HOMES)
make_callable(__name__)
