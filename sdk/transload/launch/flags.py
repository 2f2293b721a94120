"""A deployment as arguments of `vllm serve`, and what a node adds to take part in an instance."""

from __future__ import annotations

import json

from transload.launch.site import Site
from transload.launch.topology import Instance, NodePart

# bf16 is the engine's "auto". On Ascend an int8 cache comes with the checkpoint (C8), no argument asks for it.
_KV_DTYPES = {("cuda", "int8"): "int8_per_token_head"} | {(p, "fp8"): "fp8" for p in ("cuda", "cpu", "ascend")}
_FLOATS = ("bf16", "fp16", "fp32")


def serve_flags(instance: Instance, site: Site, served_name: str, port: int) -> list[str]:
    """The arguments that every node of an instance has in common: shape, limits, memory, names."""
    d, size = instance.plan, instance.parallelism
    flags = ["--served-model-name", served_name]
    flags += ["--host", site.host, "--port", str(port)]
    flags += ["--tensor-parallel-size", str(size.tp)]
    if size.pp > 1:
        flags += ["--pipeline-parallel-size", str(size.pp)]
    if size.dp > 1:
        flags += ["--data-parallel-size", str(size.dp)]
    if size.ep:
        flags.append("--enable-expert-parallel")
    if size.dcp > 1:
        flags += ["--decode-context-parallel-size", str(size.dcp)]
    flags += ["--max-model-len", str(d.max_model_len)]
    flags += ["--max-num-seqs", str(d.max_num_seqs)]
    flags += ["--max-num-batched-tokens", str(d.max_num_batched_tokens)]
    flags += _memory(instance)
    dtype = _KV_DTYPES.get((d.platform, d.kv_cache_dtype))
    if dtype is not None:
        flags += ["--kv-cache-dtype", dtype]
    if not d.prefix_caching:
        flags.append("--no-enable-prefix-caching")
    if not d.vision:
        flags.append("--language-model-only")
    if d.speculative_tokens:
        speculative = {"method": "mtp", "num_speculative_tokens": d.speculative_tokens}
        flags += ["--speculative-config", json.dumps(speculative)]
    if d.platform == "ascend":
        flags += _ascend(instance, site)
    return flags


def _memory(instance: Instance) -> list[str]:
    """On a CPU the cache is given in bytes, exactly as planned; devices are given the fraction they may use."""
    d = instance.plan
    if d.platform != "cpu":
        return ["--gpu-memory-utilization", f"{d.gpu_memory_utilization:g}"]
    sizes = [line.size for stage in d.stages for line in stage.lines if line.group == "kv"]
    return ["--kv-cache-memory-bytes", str(max(sizes))]


def _ascend(instance: Instance, site: Site) -> list[str]:
    """msModelSlim checkpoints need the plug-in's own method; others name theirs in config.json."""
    quantized = instance.plan.recipe not in _FLOATS and not instance.plan.recipe.startswith("compressed-tensors")
    flags = ["--quantization", "ascend"] if (quantized if site.msmodelslim is None else site.msmodelslim) else []
    if site.additional_config:
        flags += ["--additional-config", json.dumps(site.additional_config, sort_keys=True)]
    return flags


def node_flags(instance: Instance, part: NodePart, site: Site) -> list[str]:
    """What one node adds: its place among the others, as the instance's form says it."""
    head = part is instance.parts[0]
    address = site.address(instance.head)
    if instance.shape == "ray":
        return ["--distributed-executor-backend", "ray"]
    if instance.shape == "native":
        flags = ["--distributed-executor-backend", "mp", "--nnodes", str(len(instance.parts))]
        flags += ["--node-rank", str(instance.parts.index(part))]
        flags += ["--master-addr", address, "--master-port", str(site.master_port + instance.slot)]
        if instance.parallelism.dp > 1:
            flags += ["--data-parallel-address", address]
            flags += ["--data-parallel-rpc-port", str(site.rpc_port + instance.slot)]
        return flags if head else [*flags, "--headless"]
    if instance.shape == "dp":
        flags = ["--data-parallel-size-local", str(len(part.dp_ranks)), "--data-parallel-address", address]
        flags += ["--data-parallel-rpc-port", str(site.rpc_port + instance.slot)]
        # A start rank without --headless would give every node an API of its own.
        return flags if head else [*flags, "--data-parallel-start-rank", str(part.dp_ranks[0]), "--headless"]
    return []
