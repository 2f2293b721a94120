"""A plan for this machine, when none was given: one engine on the devices that are here."""

from __future__ import annotations

from pathlib import Path

from transload.errors import ConfigError
from transload.plan.cluster import Cluster, load_cluster
from transload.plan.discover import cluster_text
from transload.plan.planner import plan as make_plan
from transload.plan.result import Deployment, Plan, StageLedger
from transload.plan.units import show_bytes
from transload.serve.engine import HARDWARE, InstalledEngine

LOCAL = "localhost"


def local_plan(
    path: Path, engine: InstalledEngine, *, context: str | int, concurrency: int, tp: int | None, kv_cache: int | None
) -> Plan:
    """The plan that `transload serve PATH` starts: one instance, shortest latency.

    kv_cache: bytes on each device; on a CPU, whose memory serves everything else too, what `concurrency` sequences of
    `context` tokens take if left out. Raises DoesNotFit or ConfigError.
    """
    workload = {"context": context, "concurrency": concurrency, "objective": "latency" if tp is None else "throughput"}
    if engine.platform == "cpu":
        tp = tp or 1
    known = f"{engine.name}=={engine.release}"
    whole = make_plan(str(path), _here(engine.platform, tp), workload, tp=tp, engine=known).require()
    plan = one_instance(whole)
    if engine.platform != "cpu" and kv_cache is None:
        return plan
    return with_cache(plan, kv_cache)


def _here(platform: str, tp: int | None) -> Cluster:
    """The devices of one platform on this machine, as one node. A CPU counts as `tp` devices that share its memory."""
    import yaml

    found = load_cluster(yaml.safe_load(cluster_text()))
    node = found.nodes[0]
    if platform == "cpu":
        count = tp or 1
        cpu = {"type": "CPU", "count": count, "island": count, "memory": max(_memory() // count, 1 << 30)}
        return load_cluster({"name": LOCAL, "nodes": [{"name": LOCAL, "devices": [cpu]}]})
    own = [d for d in node.devices if d.resolve().platform == platform]
    if not own:
        raise ConfigError(f"no {HARDWARE[platform]} was found here (nvidia-smi, npu-smi); give --plan")
    return found.model_copy(
        update={"name": LOCAL, "nodes": (node.model_copy(update={"name": LOCAL, "devices": tuple(own)}),)}
    )


def _memory() -> int:
    """Bytes of RAM that are available now."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        return int(rows["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return 8 << 30


def one_instance(plan: Plan) -> Plan:
    """The first replica of the first deployment alone."""
    first = plan.deployments[0].model_copy(update={"replicas": 1})
    ranks = tuple(r for r in plan.ranks if r.deployment == 0 and r.replica == 0)
    first = first.model_copy(update={"devices": len(ranks)})
    sums = {"kv_tokens": first.kv_tokens, "max_concurrency": first.max_concurrency}
    return plan.model_copy(update={"deployments": (first,), "ranks": ranks, **sums})


def with_cache(plan: Plan, size: int | None) -> Plan:
    """The plan with a smaller KV cache: `size` bytes on every device, or what its workload needs.

    Raises ConfigError when the plan's cache has no such room, or `size` holds less than one sequence.
    """
    deployment = plan.deployments[0]
    tokens = max(1, min(plan.concurrency, deployment.max_num_seqs)) * plan.context
    needed = min(deployment.kv_blocks, -(-deployment.kv_blocks * tokens // deployment.kv_tokens))
    planned = max(line.size for stage in deployment.stages for line in stage.lines if line.group == "kv")
    wanted = planned * needed // deployment.kv_blocks if size is None else size
    if wanted > planned:
        raise ConfigError(f"a KV cache of {show_bytes(wanted)} does not fit: {show_bytes(planned)} are left for it")
    blocks = deployment.kv_blocks * wanted // planned
    tokens, concurrency = _scaled(deployment, blocks)
    if concurrency < 1:
        need = planned / deployment.max_concurrency
        raise ConfigError(
            f"a KV cache of {show_bytes(wanted)} holds {tokens:,} tokens, less than one sequence of {plan.context:,}: "
            f"give {show_bytes(need)} or a shorter --context"
        )
    stages = tuple(_shrunk(stage, blocks, deployment.kv_blocks) for stage in deployment.stages)
    changed = deployment.model_copy(
        update={"kv_blocks": blocks, "kv_tokens": tokens, "max_concurrency": concurrency, "stages": stages}
    )
    sums = {"kv_tokens": tokens, "max_concurrency": concurrency}
    return plan.model_copy(update={"deployments": (changed, *plan.deployments[1:]), **sums})


def _scaled(deployment: Deployment, blocks: int) -> tuple[int, float]:
    """(tokens, sequences) of fewer blocks. With one kind of cache the tokens are whole blocks."""
    tokens = deployment.kv_tokens * blocks // deployment.kv_blocks
    return tokens, round(deployment.max_concurrency * blocks / deployment.kv_blocks, 2)


def _shrunk(stage: StageLedger, blocks: int, of: int) -> StageLedger:
    """The same stage with fewer blocks: exact, because a cache is a whole number of them."""
    lines = (
        line.model_copy(update={"size": line.size * blocks // of}) if line.group == "kv" else line
        for line in stage.lines
    )
    return stage.model_copy(update={"lines": tuple(lines)})
