"""Transload: move 4-bit LLMs between hardware vendors, run them, and plan their deployment.

Names are loaded on first use (PEP 562), so that `import transload` and the CLI's --help stay fast: torch comes in only
when a job needs it.
"""

from __future__ import annotations

from importlib import import_module

_HOMES = {
    "TransloadError": "transload.errors",
    "ActSpec": "transload.quant",
    "Checkpoint": "transload.checkpoint",
    "EvalReport": "transload.evaluation",
    "PortReport": "transload.porting",
    "QTensor": "transload.quant",
    "QuantSpec": "transload.quant",
    "TransloadConfig": "transload.runtime",
    "evaluate": "transload.evaluation",
    "generate": "transload.runtime",
    "inspect": "transload.inspection",
    "load": "transload.runtime",
    "open": "transload.checkpoint",
    "plan": "transload.plan.planner",
    "port": "transload.porting",
    "quantize": "transload.quantize",
    "serve": "transload.serve.service",
    "verify": "transload.porting",
}

__all__ = sorted(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'transload' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
