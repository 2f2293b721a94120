"""Kubernetes: a Deployment for engines on one node, a LeaderWorkerSet for those over several, services and a router.

Kubernetes places pods itself: node names, addresses and device numbers of the plan are left to it, while sizes stay as
planned. Replicas that are spread alike over nodes share one object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transload.errors import ConfigError
from transload.launch import router
from transload.launch.flags import serve_flags
from transload.launch.pod import LEADER, WORKER, container, pod
from transload.launch.setting import Setting
from transload.launch.topology import Instance
from transload.launch.words import engine_words, header, memory_words, one_line, slug
from transload.launch.yamltext import documents, remark

FORMAT = "kubernetes"
PORT = 8000  # inside a pod, where nothing else listens


@dataclass(frozen=True, slots=True)
class Group:
    """Instances that one Kubernetes object stands for."""

    number: int
    instances: tuple[Instance, ...]

    @property
    def first(self) -> Instance:
        """Any of them: they are alike."""
        return self.instances[0]

    @property
    def size(self) -> int:
        """Nodes of one instance."""
        return len(self.first.parts)


def groups(setting: Setting) -> list[Group]:
    """Instances by deployment and spread. Raises ConfigError for a spread that a LeaderWorkerSet cannot have."""
    found: dict[tuple[int, tuple[int, ...]], list[Instance]] = {}
    for instance in setting.instances:
        counts = tuple(len(part.devices) for part in instance.parts)
        if len(set(counts)) > 1:
            raise ConfigError(
                f"kubernetes: engine-{instance.number} takes {', '.join(map(str, counts))} devices of its nodes, and "
                "the workers of a LeaderWorkerSet are alike; plan it with equal nodes (--tp, --pp, --dp)"
            )
        if instance.shape == "ray":
            raise ConfigError(f"kubernetes: engine-{instance.number} needs Ray; use the ray format, or KubeRay")
        found.setdefault((instance.deployment, counts), []).append(instance)
    return [Group(n, tuple(own)) for n, own in enumerate(found.values())]


def files(setting: Setting) -> dict[str, str]:
    """kubernetes/engine-N.yaml for every group of instances, and router.yaml when there are several groups."""
    found = groups(setting)
    out = {f"kubernetes/engine-{group.number}.yaml": _file(setting, group) for group in found}
    if len(found) > 1:
        out["kubernetes/router.yaml"] = _router(setting, found)
    return out


def _file(setting: Setting, group: Group) -> str:
    instance = group.first
    kind = "Deployment" if group.size == 1 else "LeaderWorkerSet (its controller must be installed)"
    about = [
        *header(setting.plan, f"A {kind}: kubectl apply -f kubernetes/"),
        f"{len(group.instances)} x {engine_words(instance).partition(': ')[2]}",
        memory_words(instance),
        f"Every node has the checkpoint in {one_line(setting.path(instance))}; a volume claim may take its place.",
    ]
    workload = _deployment(setting, group) if group.size == 1 else _set(setting, group)
    return documents([_service(setting, group), workload], about)


def _name(setting: Setting, group: Group) -> str:
    return f"{slug(setting.plan.model)}-{group.number}"


def _labels(setting: Setting, group: Group) -> dict[str, str]:
    return {"app.kubernetes.io/name": slug(setting.plan.model), "app.kubernetes.io/component": f"engine-{group.number}"}


def _service(setting: Setting, group: Group) -> dict[str, object]:
    selector = _labels(setting, group)
    if group.size > 1:
        selector = {**selector, "leaderworkerset.sigs.k8s.io/worker-index": "0"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": _name(setting, group), "labels": _labels(setting, group)},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": PORT, "targetPort": "http"}]},
    }


def _deployment(setting: Setting, group: Group) -> dict[str, object]:
    labels = _labels(setting, group)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": _name(setting, group), "labels": labels},
        "spec": {
            "replicas": len(group.instances),
            **remark("Devices are taken, so an old pod must go before a new one can start."),
            "strategy": {"type": "Recreate"},
            "progressDeadlineSeconds": 7200,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": pod(_container(setting, group, None), setting, group.first),
            },
        },
    }


def _set(setting: Setting, group: Group) -> dict[str, object]:
    labels = _labels(setting, group)
    leader, worker = (
        {"metadata": {"labels": labels}, "spec": pod(_container(setting, group, role), setting, group.first)}
        for role in (LEADER, WORKER)
    )
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {
            "name": _name(setting, group),
            "labels": labels,
        },
        "spec": {
            "replicas": len(group.instances),
            "startupPolicy": "LeaderCreated",
            "leaderWorkerTemplate": {
                "size": group.size,
                **remark("Ranks cannot rejoin: when one pod is lost, its group starts anew."),
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": leader,
                "workerTemplate": worker,
            },
        },
    }


def _container(setting: Setting, group: Group, role: str | None) -> dict[str, object]:
    instance = group.first
    flags = serve_flags(instance, setting.site, setting.name, PORT)
    return container(setting, instance, [setting.path(instance), *flags, *setting.site.arguments], PORT, role)


def _router(setting: Setting, found: Sequence[Group]) -> str:
    """nginx before the services; a service's weight is that of all its replicas."""
    weights = router.weights([i for group in found for i in group.instances])
    shares = {i.number: w for i, w in zip((i for g in found for i in g.instances), weights, strict=True)}
    servers = [
        (f"{_name(setting, g)}:{PORT}", sum(shares[i.number] for i in g.instances), engine_words(g.first))
        for g in found
    ]
    name = f"{slug(setting.plan.model)}-router"
    labels = {"app.kubernetes.io/name": slug(setting.plan.model), "app.kubernetes.io/component": "router"}
    metadata = {"name": name, "labels": labels}
    nginx = {
        "name": "nginx",
        "image": router.IMAGE,
        "ports": [{"name": "http", "containerPort": router.PORT}],
        "volumeMounts": [{"name": "config", "mountPath": "/etc/nginx/nginx.conf", "subPath": "nginx.conf"}],
        "readinessProbe": {"httpGet": {"path": "/router/health", "port": "http"}},
        "resources": {"requests": {"cpu": "500m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
    }
    spec = {
        "replicas": 2,
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": labels},
            "spec": {
                "automountServiceAccountToken": False,
                "containers": [nginx],
                "volumes": [{"name": "config", "configMap": {"name": name}}],
            },
        },
    }
    items: list[object] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"nginx.conf": router.text(servers)}},
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata,
            "spec": {"selector": labels, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
        },
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec},
    ]
    return documents(items, header(setting.plan, "One address for all engines, weighted as planned."))
