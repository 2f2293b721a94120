"""The pod of an engine process in Kubernetes: resources, probes, mounts, and its place in a LeaderWorkerSet."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

from transload.launch.container import ASCEND_MOUNTS, STOP_SECONDS, image, start_seconds
from transload.launch.environment import INTERFACES, NETWORK, VISIBLE, environment
from transload.launch.setting import Setting
from transload.launch.shell import joined
from transload.launch.topology import Instance
from transload.launch.words import options, slug
from transload.launch.yamltext import Flow, remark

LEADER, WORKER = "leader", "worker"
INTERFACE = "eth0"  # of a pod's own network
RESOURCES = {"cuda": "nvidia.com/gpu", "ascend": "huawei.com/Ascend910"}
_PROBE_SECONDS = 10


def pod(container: dict[str, object], setting: Setting, instance: Instance) -> dict[str, object]:
    """The pod's spec around its container."""
    hosted = [("checkpoint", setting.path(instance))]
    if instance.plan.platform == "ascend":
        hosted += [(f"driver-{n}", path) for n, path in enumerate(ASCEND_MOUNTS)]
    volumes: list[object] = [
        {"name": name, "hostPath": {"path": path, **({"type": "Directory"} if name == "checkpoint" else {})}}
        for name, path in hosted
    ]
    volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}})
    container["volumeMounts"] = [
        *({"name": name, "mountPath": path, "readOnly": True} for name, path in hosted),
        {"name": "shm", "mountPath": "/dev/shm"},
    ]
    return {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": STOP_SECONDS,
        "containers": [container],
        "volumes": volumes,
    }


def container(
    setting: Setting, instance: Instance, arguments: Sequence[str], port: int, role: str | None
) -> dict[str, object]:
    """An engine's container. arguments: of `vllm serve`, common to all nodes; role: in a LeaderWorkerSet, or None."""
    out: dict[str, object] = {"name": "engine", "image": image(instance, setting.site)}
    if role is None:
        out["command"] = Flow(["vllm", "serve"])
        out["args"] = [_literal(word) for word in options(arguments)]
    else:
        out["command"] = Flow(["bash", "-c"])
        out["args"] = [_literal(_script(setting, instance, arguments, role))]
    out["env"] = _env(setting, instance)
    if not out["env"]:
        del out["env"]
    if role != WORKER:
        secret = {"name": f"{slug(setting.plan.model)}-env", "optional": True}
        out |= {**remark("May hold VLLM_API_KEY."), "envFrom": [{"secretRef": secret}]}
        out["ports"] = [{"name": "http", "containerPort": port}]
    out["resources"] = _resources(instance)
    if instance.plan.platform == "cpu":
        capabilities = {"capabilities": {"add": Flow(["SYS_NICE"])}}
        out |= {**remark("The engine binds threads and memory to NUMA nodes."), "securityContext": capabilities}
    if role != WORKER:
        out |= _probes(instance)
    return out


def _script(setting: Setting, instance: Instance, arguments: Sequence[str], role: str) -> str:
    words = ["exec vllm serve", *(shlex.quote(word) for word in arguments), *_place(setting, instance, role)]
    return joined(words, "  ").lstrip() + "\n"


def _place(setting: Setting, instance: Instance, role: str) -> list[str]:
    """Where a pod stands among the others, from the variables that LeaderWorkerSet sets.

    The head binds to its own address, the others look for the leader's.
    """
    site, head = setting.site, role == LEADER
    address = '"$VLLM_HOST_IP"' if head else '"$LWS_LEADER_ADDRESS"'
    if instance.shape == "native":
        words = ["--distributed-executor-backend", "mp", "--nnodes", '"$LWS_GROUP_SIZE"']
        words += [
            "--node-rank",
            '"$LWS_WORKER_INDEX"',
            "--master-addr",
            address,
            "--master-port",
            str(site.master_port),
        ]
        if instance.parallelism.dp > 1:
            words += ["--data-parallel-address", address, "--data-parallel-rpc-port", str(site.rpc_port)]
        return words if head else [*words, "--headless"]
    local = len(instance.parts[0].dp_ranks)
    first = '"$LWS_WORKER_INDEX"' if local == 1 else f'"$((LWS_WORKER_INDEX * {local}))"'
    words = ["--data-parallel-size-local", str(local), "--data-parallel-address", address]
    words += ["--data-parallel-rpc-port", str(site.rpc_port)]
    return words if head else [*words, "--data-parallel-start-rank", first, "--headless"]


def _env(setting: Setting, instance: Instance) -> list[object]:
    """The engine's variables; the address is the pod's own, the devices are those that the kubelet gives."""
    platform = instance.plan.platform
    left_out = {*NETWORK, *VISIBLE.values()}
    env = environment(instance, instance.parts[0], setting.site)
    rows: list[object] = []
    if len(instance.parts) > 1:
        own = {"valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
        rows += [{"name": n, **own} for n in ("VLLM_HOST_IP", *(("HCCL_IF_IP",) if platform == "ascend" else ()))]
        rows += [{"name": n, "value": INTERFACE} for n in INTERFACES[platform]]
    return rows + [{"name": n, "value": _literal(v)} for n, v in env.items() if n not in left_out]


def _resources(instance: Instance) -> dict[str, object]:
    count = len(instance.parts[0].devices)
    name = RESOURCES.get(instance.plan.platform)
    if name is not None:
        return {"limits": {name: str(count)}}
    needed = max(sum(x.size for x in s.lines) for s in instance.plan.stages) * count
    memory = f"{-(-needed // (1 << 30)) + 2}Gi"
    return {"requests": {"memory": memory}, "limits": {"memory": memory}}


def _probes(instance: Instance) -> dict[str, object]:
    """An engine may take long to start; then it is ready while it answers, and restarted after a minute of silence."""
    health = {"httpGet": {"path": "/health", "port": "http"}, "timeoutSeconds": 5}
    starts = -(-start_seconds(instance) // _PROBE_SECONDS)
    return {
        "startupProbe": {**health, "periodSeconds": _PROBE_SECONDS, "failureThreshold": starts},
        "readinessProbe": {**health, "periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {**health, "periodSeconds": _PROBE_SECONDS, "failureThreshold": 6},
    }


def _literal(text: str) -> str:
    """Text in which Kubernetes expands no $(VARIABLE) and takes no $$ for a $."""
    return re.sub(r"\$(?=[$(])", "$$", text)
