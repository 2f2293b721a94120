"""Environment variables of one engine process: devices, addresses, interfaces, communication buffers."""

from __future__ import annotations

from transload.launch.site import Site
from transload.launch.topology import Instance, NodePart

VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "ascend": "ASCEND_RT_VISIBLE_DEVICES"}

# The variables that name a network interface. vLLM's own process groups run over gloo on every platform.
INTERFACES = {
    "cuda": ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"),
    "ascend": ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME"),
    "cpu": ("GLOO_SOCKET_IFNAME",),
}

# Everything that says where a node is; scripts fill these in on the node itself.
NETWORK = ("VLLM_HOST_IP", "HCCL_IF_IP", *dict.fromkeys(name for names in INTERFACES.values() for name in names))


def environment(instance: Instance, part: NodePart, site: Site) -> dict[str, str]:
    """The variables for the part of an instance that runs on one node, in the order in which files show them."""
    platform = instance.plan.platform
    env: dict[str, str] = {}
    if platform in VISIBLE:
        if len(set(part.device_types)) > 1:
            env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"  # unlike cards keep the numbers that nvidia-smi shows
        env[VISIBLE[platform]] = ",".join(str(d) for d in part.devices)
    if len(instance.parts) > 1:
        env |= _network(platform, part, site)
    if platform == "ascend":
        env |= _ascend(instance, site)
    if instance.shape == "ray":
        env["RAY_ADDRESS"] = f"{site.address(instance.head)}:{site.ray_port + instance.slot}"
    if instance.plan.uneven:
        env["VLLM_PP_LAYER_PARTITION"] = ",".join(str(n) for n in instance.plan.cuts)
    return {**env, **site.env}


def _network(platform: str, part: NodePart, site: Site) -> dict[str, str]:
    env: dict[str, str] = {}
    ip = site.host_ip(part.node)
    if ip is not None:
        env["VLLM_HOST_IP"] = ip
        if platform == "ascend":
            env["HCCL_IF_IP"] = ip
    interface = site.interfaces.get(part.node)
    if interface is not None:
        env |= dict.fromkeys(INTERFACES[platform], interface)
    return env


def _ascend(instance: Instance, site: Site) -> dict[str, str]:
    """Settings that vllm-ascend's own multi-card jobs use; HCCL_BUFFSIZE is in MB and held twice per communicator."""
    env = {
        "HCCL_BUFFSIZE": str(site.hccl_buffsize),
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "OMP_PROC_BIND": "false",
        "OMP_NUM_THREADS": "1",
        "PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True",
        "TASK_QUEUE_ENABLE": "1",
    }
    if len(instance.parts) > 1 and "910B" in instance.plan.device:
        # Inside an A2 server ranks talk over its own links, between servers over the devices' network ports.
        env |= {"HCCL_INTRA_PCIE_ENABLE": "1", "HCCL_INTRA_ROCE_ENABLE": "0"}
    if len(instance.parts) > 1:
        env["HCCL_CONNECT_TIMEOUT"] = "1800"  # nodes finish loading at different times; the default is 120 s
    if instance.shape == "ray":
        # Ray would otherwise overwrite the variable; vLLM places its workers by the resource called NPU.
        env["RAY_EXPERIMENTAL_NOSET_ASCEND_RT_VISIBLE_DEVICES"] = "1"
    return env
