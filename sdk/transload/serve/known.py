"""Known ways in which engines fail: a pattern over single lines of the log, what happened, what to do.

One row a failure, the most specific first. Groups of the pattern fill {0}, {1}. The lines are those of vLLM 0.23 to
0.32, torch, gloo, NCCL and HCCL.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """One known failure. name: a short word for machines."""

    name: str
    pattern: re.Pattern[str]
    sentence: str
    next_step: str


def _row(name: str, pattern: str, sentence: str, next_step: str) -> Row:
    return Row(name, re.compile(pattern), sentence, next_step)


_GIB = r"([\d.]+)"
ROWS = (
    _row(
        "kv-too-small",
        rf"\({_GIB} GiB KV cache is needed, which is larger than the available KV cache memory \({_GIB} GiB\)\.?"
        r"(?:.*estimated maximum model length is (\d+))?",
        "one request of the maximum length needs {0} GiB of KV cache and {1} GiB are left",
        "plan with a shorter --context{2}, fp8 KV cache, more devices or a larger --gpu-memory-utilization",
    ),
    _row(
        "kv-too-small",
        r"No available memory for the cache blocks",
        "weights and buffers leave no memory for the KV cache",
        "use more devices (--tp), fewer --max-num-batched-tokens, or a larger --gpu-memory-utilization",
    ),
    _row(
        "memory-taken",
        rf"(?:memory on device|memory on node) (\S+) \({_GIB}/{_GIB} GiB\) on startup is less than desired",
        "other programs use the memory of device {0}: {1} of {2} GiB are free, less than the engine wants",
        "end those programs, or give a smaller --gpu-memory-utilization",
    ),
    _row(
        "memory-taken",
        rf"Available memory on node (\S+) \({_GIB}/{_GIB} GiB\) on kv cache",
        "the KV cache does not fit into the memory of NUMA node {0}: {1} of {2} GiB are free",
        "give a smaller --kv-cache, or end other programs",
    ),
    _row(
        "out-of-memory",
        r"(?:CUDA|NPU|HIP|XPU) out of memory\. Tried to allocate ([\d.]+ [KMGi]*B)|(OutOfMemoryError)(?!:.*Tried)|"
        r"DefaultCPUAllocator: (can't allocate memory)|(aclrtMalloc).*(?:failed|207001)",
        "device memory ran out ({0})",
        "lower --gpu-memory-utilization by 0.05 (memory outside the engine's budget ran out), or plan with fewer "
        "--concurrency, fewer --max-num-batched-tokens or more devices (`transload plan MODEL --what-if` lists them)",
    ),
    _row(
        "group-alignment",
        r"Weight input_size_per_partition=(\d+)(?: for layer '([^']+)')? is not divisible by group_size=(\d+)",
        "tensor parallelism cuts layer '{1}' into {0} inputs, not a whole number of quantization groups of {2}",
        "use a smaller --tp, expert parallelism (--ep), or a checkpoint with smaller groups: "
        "transload port PATH OUT --to ENGINE --requantize int4-g32",
    ),
    _row(
        "group-alignment",
        r"(?:input|output) size is not aligned with the quantized weight shape|"
        r"(?:[Mm]in_thread_[kn]|not divisible by.*(?:group_size|min_thread))",
        "tensor parallelism cuts a quantized layer inside a quantization group or a kernel's tile",
        "use a smaller --tp, or expert parallelism (--ep) for experts",
    ),
    _row(
        "head-alignment",
        r"Total number of attention heads \((\d+)\) must be divisible by tensor parallel size \((\d+)\)",
        "{0} attention heads cannot be cut into {1} parts",
        "use a --tp that divides {0}",
    ),
    _row(
        "numa",
        r"Not enough allowed NUMA nodes to bind threads of (\d+) local",
        "this machine has fewer NUMA nodes than the {0} workers, and vLLM binds one worker to each",
        "bind cores by hand: --env 'VLLM_CPU_OMP_THREADS_BIND=0-3|4-7' (cores of the first worker, then the second)",
    ),
    _row(
        "interface",
        r"Unable to find address for: (\S+)",
        "gloo was told to use network interface '{0}', which this node does not have or which has no address",
        "set GLOO_SOCKET_IFNAME (TP_SOCKET_IFNAME, HCCL_SOCKET_IFNAME) to the interface that `ip -brief address` shows "
        "for this node's address",
    ),
    _row(
        "interface",
        r"no socket interface found|(?:ncclSocketInit|Bootstrap).*(?:connecting to address.*family|no .*interface)",
        "NCCL found no network interface of the name in NCCL_SOCKET_IFNAME",
        "set NCCL_SOCKET_IFNAME to an interface of this node (`ip -brief address`)",
    ),
    _row(
        "interface",
        r"Unable to resolve hostname to a \(local\) address\. Using the loopback",
        "this node's name does not resolve to one of its addresses, so gloo used loopback, which others cannot reach",
        "set GLOO_SOCKET_IFNAME to the interface that `ip -brief address` shows for this node's address",
    ),
    _row(
        "interface",
        r"(?:Cannot assign requested address|EADDRNOTAVAIL).*?(\S*)$",
        "the engine was told to listen on an address that this node does not have",
        "compare VLLM_HOST_IP, HCCL_IF_IP and --host with `ip -brief address` on this node",
    ),
    _row(
        "hccl-connect",
        r"EI0006|HCCL_CONNECT_TIMEOUT|wait socket establish timeout",
        "an NPU waited for another one in vain (HCCL EI0006, connect timeout)",
        "look for the first error on the other nodes; if all are only slow (loading large weights), raise "
        "HCCL_CONNECT_TIMEOUT to 1800 on all nodes; check links with `hccn_tool -i N -link -g` and -net_health -g",
    ),
    _row(
        "hccl-execute",
        r"EI0002|HCCL_EXEC_TIMEOUT|notify wait timeout",
        "an NPU waited for another one during a collective operation (HCCL EI0002, execution timeout)",
        "look for a rank that failed or hangs first; if none did, raise HCCL_EXEC_TIMEOUT on all nodes",
    ),
    _row(
        "hccl-port",
        r"listen on ip\[([^\]]+)\] and specific port\[(\d+)\] fail|EJ0003|EI0019",
        "HCCL cannot listen on port {1} of {0}: another process on this NPU uses it",
        "end processes left from earlier starts (`npu-smi info`), or set HCCL_NPU_SOCKET_PORT_RANGE=auto",
    ),
    _row(
        "peer-lost",
        r"Connection (?:closed|reset) by peer \[([^\]]+)\]",
        "the connection to the worker at {0} was lost: it, or its node, stopped",
        "see the log of that node for the first error; start it again with: transload launch DIR --node K",
    ),
    _row(
        "peer-lost",
        r"(?:SO_ERROR: )?Connection refused, remote=\[?([^\],]+)\]?|Gloo connectFullMesh failed",
        "a worker could not connect to another one at {0}",
        "check that addresses and interfaces of all nodes belong to one network and that no firewall is between them",
    ),
    _row(
        "peer-timeout",
        r"client socket has timed out after \d+ms while trying to connect|waitForInput.*timed out|"
        r"DistStoreError.*timed out|Timed out after \d+ seconds waiting for clients",
        "not all nodes joined in time",
        "start the missing nodes (transload launch DIR --node K), and check that they reach the head's address and "
        "--master-port through the firewall",
    ),
    _row(
        "master-port-in-use",
        r"server socket has failed to (?:listen|bind).*?port: (\d+).*(?:EADDRINUSE|already in use)",
        "port {0}, on which the workers meet, is in use on this node",
        "end the process that uses it (`ss -ltnp`), or render the plan with another --master-port",
    ),
    _row(
        "port-in-use",
        r"error while attempting to bind on address \('[^']*', (\d+)\)",
        "the engine's port {0} is in use",
        "end the process that uses it (`ss -ltnp`), or give another --port",
    ),
    _row(
        "port-in-use",
        r"Address already in use|EADDRINUSE",
        "a port that the engine needs is in use",
        "end the processes of earlier starts (`ss -ltnp`), or give another --port",
    ),
    _row(
        "missing-tensors",
        r"Following weights were not initialized from checkpoint: (.{0,200})",
        "the checkpoint lacks tensors that the engine needs: {0}",
        "check the download, then `transload inspect PATH`; port it again if it came from another format",
    ),
    _row(
        "missing-tensors",
        r"There is no module or parameter named (\S+) in|KeyError: '((?:model\.)?layers\.[^']+)'",
        "the checkpoint has tensors under names that the engine does not know: {0}",
        "it was written for another engine or family: transload port PATH OUT --to ENGINE",
    ),
    _row(
        "damaged",
        r"SafetensorError|Error while deserializing header|incomplete metadata, file not fully covered",
        "a file of the checkpoint is damaged or not complete",
        "compare the files with their source (checkpoint.sha256 of a rendered plan), and download them again",
    ),
    _row(
        "no-kernel",
        r"Failed to find a kernel that can implement the (.+?) layer",
        "the engine has no kernel for the checkpoint's quantization ({0})",
        "transload inspect PATH says who runs it; transload port PATH OUT --to ENGINE makes one that this engine runs",
    ),
    _row(
        "quantization-unknown",
        r"Unknown quantization method: (\S+)|quantization: Input should be .*input_value='(\w+)'",
        "the engine does not know quantization '{0}'",
        "transload port PATH OUT --to ENGINE; for 'ascend' the plug-in vllm-ascend must be installed",
    ),
    _row(
        "architecture-unknown",
        r"Model architectures (\[[^\]]*\]) are not supported for now",
        "this version of the engine does not know the architecture {0}",
        "use a newer engine, or --trust-remote-code if the model brings its code",
    ),
    _row(
        "bad-argument",
        r"(?:vllm(?: serve)?|api_server\.py): error: (.{0,300})",
        "the engine refuses its arguments: {0}",
        "correct the arguments after --; if they come from a plan, it was made for another version of the engine: plan "
        "and render again for the installed one",
    ),
    _row(
        "no-metadata",
        r"No package metadata was found for (\S+)",
        "the engine's package metadata is missing for {0}",
        "install the engine again; for vllm-cpu, ci/vllm shows the metadata folder that it needs",
    ),
    _row(
        "driver",
        r"(NVIDIA driver on your system is too old|no CUDA-capable device is detected|driver version is insufficient|"
        r"libcuda\.so\.1: cannot open|libascend_hal\.so: cannot open|libascendcl\.so: cannot open|No NVIDIA GPU|"
        r"drvErr=\d+|Device string must not be empty)",
        "the engine found no usable device ({0})",
        "check nvidia-smi or npu-smi info in the same environment and container, and the visible-devices variable",
    ),
    _row(
        "shared-memory",
        r"No space left on device|Unexpected bus error|unable to (?:allocate|open) shared memory",
        "the disk or /dev/shm is full",
        "free space; in a container use --ipc=host or --shm-size=16g",
    ),
    _row(
        "assertion",
        r"assert self\.intermediate_tensors is not None",
        "the CPU engine cannot run pipeline parallelism",
        "plan with --pp 1 and a larger --tp",
    ),
)
