"""The deployment planner: from a checkpoint's headers and a cluster to every byte on every device.

    import transload
    plan = transload.plan("GLM-5/", "cluster.yaml", {"context": "32k", "concurrency": 16}, recipe="w4a8")
    print(plan.fits, plan.reason, plan.kv_tokens)

The package itself can be called, so that `transload.plan(...)` works whether or not its modules are imported. Nothing
here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from transload.package import lazy, make_callable

if TYPE_CHECKING:
    from transload.plan.cluster import Cluster as Cluster
    from transload.plan.cluster import load_cluster as load_cluster
    from transload.plan.explain import explain as explain
    from transload.plan.picture import plan_html as plan_html
    from transload.plan.picture import plan_svg as plan_svg
    from transload.plan.planner import Question as Question
    from transload.plan.planner import answer as answer
    from transload.plan.planner import plan as plan
    from transload.plan.result import Plan as Plan
    from transload.plan.sources import load_model as load_model
    from transload.plan.table import plan_table as plan_table
    from transload.plan.whatif import what_if as what_if
    from transload.plan.workload import Workload as Workload

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
__getattr__ = lazy(__name__, _HOMES)
make_callable(__name__)
