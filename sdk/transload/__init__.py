"""Transload: move 4-bit LLMs between hardware vendors, run them, and plan their deployment.

Names are loaded on first use (PEP 562), so that `import transload` and the CLI's --help stay fast: torch comes in only
when a job needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transload.package import lazy

if TYPE_CHECKING:  # what type checkers see; at run time the table below
    from transload.checkpoint import Checkpoint as Checkpoint
    from transload.checkpoint import open as open
    from transload.errors import TransloadError as TransloadError
    from transload.evaluation import EvalReport as EvalReport
    from transload.evaluation import evaluate as evaluate
    from transload.inspection import inspect as inspect
    from transload.plan.planner import plan as plan
    from transload.porting import PortReport as PortReport
    from transload.porting import port as port
    from transload.porting.verify import verify as verify
    from transload.quant import ActSpec as ActSpec
    from transload.quant import QTensor as QTensor
    from transload.quant import QuantSpec as QuantSpec
    from transload.quantize.run import quantize as quantize
    from transload.runtime import TransloadConfig as TransloadConfig
    from transload.runtime import generate as generate
    from transload.runtime import load as load
    from transload.serve.service import serve as serve

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
__getattr__ = lazy(__name__, _HOMES)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
