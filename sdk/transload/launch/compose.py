"""Docker compose: compose/NODE.yaml runs what one node runs, with the host's network."""

from __future__ import annotations

from transload.launch import router
from transload.launch.command import EngineCommand
from transload.launch.container import (
    ASCEND_DEVICES,
    ASCEND_MOUNTS,
    STOP_SECONDS,
    container_env,
    image,
    probe,
    start_seconds,
)
from transload.launch.environment import INTERFACES
from transload.launch.setting import Setting
from transload.launch.shell import where
from transload.launch.topology import Instance, NodePart
from transload.launch.words import engine_words, header, memory_words, options, slug
from transload.launch.yamltext import Flow, document, remark

FORMAT = "compose"


def files(setting: Setting) -> dict[str, str]:
    """compose/NODE.yaml for every node. Raises ConfigError for an engine without a known image."""
    out = {f"compose/{node}.yaml": _file(setting, node) for node in setting.nodes}
    return out | ({"compose/router.yaml": _router(setting)} if len(setting.instances) > 1 else {})


def _router(setting: Setting) -> str:
    service = {
        "image": router.IMAGE,
        "network_mode": "host",
        "restart": "unless-stopped",
        "volumes": [
            {"type": "bind", "source": f"../{router.FILE}", "target": "/etc/nginx/nginx.conf", "read_only": True}
        ],
    }
    about = f"One address for all engines, port {router.PORT}: docker compose -f compose/router.yaml up -d"
    return document(
        {"name": f"{slug(setting.plan.model)}-router", "services": {"router": service}}, header(setting.plan, about)
    )


def _file(setting: Setting, node: str) -> str:
    rows = setting.on(node)
    head = header(setting.plan, f"What node {node} runs: docker compose -f compose/{node}.yaml up -d")
    if any(_asks(setting, i, p) for i, p, _ in rows):
        head.append("HOST_IP and INTERFACE must be set where the cluster file does not say them, in .env for example.")
    services: dict[str, object] = {}
    for instance, part, command in rows:
        services |= remark(engine_words(instance), where(instance, command), memory_words(instance))
        services[slug(command.name, 60)] = _service(setting, instance, part, command)
    return document({"name": slug(setting.plan.model), "services": services}, head)


def _asks(setting: Setting, instance: Instance, part: NodePart) -> bool:
    site, node = setting.site, part.node
    return len(instance.parts) > 1 and (site.host_ip(node) is None or node not in site.interfaces)


def _service(setting: Setting, instance: Instance, part: NodePart, command: EngineCommand) -> dict[str, object]:
    path = setting.path(instance)
    env = _network(setting, instance, part) | _dollars(container_env(command, instance, part))
    if command.role == "head":
        env["VLLM_API_KEY"] = "${VLLM_API_KEY:-}"
    service: dict[str, object] = {
        "image": image(instance, setting.site),
        "network_mode": "host",
        "ipc": "host",
        "restart": "unless-stopped",
        "stop_grace_period": f"{STOP_SECONDS}s",
        "ulimits": {"memlock": -1, "stack": 67108864, "nofile": 1048576},
        **({"environment": env} if env else {}),
    }
    volumes = [_mount(path)]
    if instance.plan.platform == "cuda":
        ids = [str(d) for d in sorted(part.devices)]
        device = {"driver": "nvidia", "device_ids": Flow(ids), "capabilities": Flow(["gpu"])}
        service["deploy"] = {"resources": {"reservations": {"devices": [device]}}}
    if instance.plan.platform == "ascend":
        own = [f"/dev/davinci{d}" for d in sorted(part.devices)]
        service["devices"] = [f"{name}:{name}" for name in (*own, *ASCEND_DEVICES)]
        mounts = ASCEND_MOUNTS if len(part.devices) > 1 else ASCEND_MOUNTS[:-2]
        volumes += [_mount(name) for name in mounts]
    if instance.plan.platform == "cpu":
        service |= {**remark("The engine binds threads and memory to NUMA nodes."), "cap_add": Flow(["SYS_NICE"])}
    service["volumes"] = volumes
    service["entrypoint"] = Flow(command.argv[:2])
    service["command"] = [_dollar(word) for word in options(command.argv[2:])]
    if command.role == "head":
        service["healthcheck"] = {
            "test": Flow(["CMD", *probe(command)]),
            "interval": "15s",
            "timeout": "10s",
            "retries": 4,
            "start_period": f"{start_seconds(instance)}s",
        }
    return service


def _network(setting: Setting, instance: Instance, part: NodePart) -> dict[str, str]:
    """Address and interface: as the cluster file says, else asked of whoever starts it."""
    if len(instance.parts) == 1:
        return {}
    site, platform = setting.site, instance.plan.platform
    ip = site.host_ip(part.node) or "${HOST_IP:?the address of this node}"
    interface = site.interfaces.get(part.node, "${INTERFACE:?the network interface with HOST_IP}")
    env = {"VLLM_HOST_IP": ip} | ({"HCCL_IF_IP": ip} if platform == "ascend" else {})
    return env | dict.fromkeys(INTERFACES[platform], interface)


def _mount(path: str) -> dict[str, object]:
    return {"type": "bind", "source": _dollar(path), "target": _dollar(path), "read_only": True}


def _dollars(env: dict[str, str]) -> dict[str, str]:
    return {name: _dollar(value) for name, value in env.items()}


def _dollar(text: str) -> str:
    """Text that compose does not interpolate."""
    return text.replace("$", "$$")
