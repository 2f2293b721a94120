"""The deployment planner: from a checkpoint's headers and a cluster to every byte on every device.

    import transload
    plan = transload.plan("GLM-5/", "cluster.yaml", {"context": "32k", "concurrency": 16}, recipe="w4a8")
    print(plan.fits, plan.reason, plan.kv_tokens)

The package itself can be called, so that `transload.plan(...)` works whether or not its modules are imported. Nothing
here imports torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transload.plan.catalogue import Constant
    from transload.plan.cluster import Cluster
    from transload.plan.result import Plan
    from transload.plan.sources import ModelSource
    from transload.plan.workload import Workload

_HOMES = {
    "Cluster": "transload.plan.cluster",
    "Plan": "transload.plan.result",
    "Question": "transload.plan.planner",
    "Workload": "transload.plan.workload",
    "answer": "transload.plan.planner",
    "explain": "transload.plan.explain",
    "load_cluster": "transload.plan.cluster",
    "load_model": "transload.plan.sources",
    "plan": "transload.plan.planner",
    "plan_html": "transload.plan.picture",
    "plan_svg": "transload.plan.picture",
    "plan_table": "transload.plan.table",
    "what_if": "transload.plan.whatif",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'transload.plan' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


class _Planner(ModuleType):
    """This package, callable."""

    def __call__(
        self,
        model: ModelSource,
        cluster: Cluster | Mapping[str, object] | str | Path,
        workload: Workload | Mapping[str, object] | str | Path | None = None,
        *,
        recipe: str | None = None,
        tp: int | None = None,
        pp: int | None = None,
        dp: int | None = None,
        ep: bool | None = None,
        dcp: int | None = None,
        engine: str | None = None,
        gpu_memory_utilization: float | None = None,
        constants: Mapping[str, Mapping[str, Constant]] | None = None,
    ) -> Plan:
        """`transload.plan.planner.plan`."""
        from transload.plan.planner import plan

        return plan(
            model,
            cluster,
            workload,
            recipe=recipe,
            tp=tp,
            pp=pp,
            dp=dp,
            ep=ep,
            dcp=dcp,
            engine=engine,
            gpu_memory_utilization=gpu_memory_utilization,
            constants=constants,
        )


sys.modules[__name__].__class__ = _Planner
