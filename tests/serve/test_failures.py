"""Known failures become a sentence and a next step. The lines are the engines' own."""

# ruff: noqa: E501  (log lines are as long as they are)

from __future__ import annotations

import pytest

from transload.serve.failures import explain
from transload.serve.known import ROWS

CASES = (
    ("To serve at least one request with the models's max seq len (131072), (16.0 GiB KV cache is needed, which is "
     "larger than the available KV cache memory (4.2 GiB). Based on the available memory, the estimated maximum model "
     "length is 34304.", "kv-too-small", "16.0 GiB of KV cache and 4.2 GiB are left", "at most 34304"),
    ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`", "kv-too-small",
     "leave no memory", "--tp"),
    ("ValueError: Free memory on device cuda:0 (3.2/79.1 GiB) on startup is less than desired GPU memory utilization "
     "(0.92, 72.8 GiB).", "memory-taken", "device cuda:0: 3.2 of 79.1 GiB", "--gpu-memory-utilization"),
    ("ValueError: Available memory on node 0 (2.1/23.4 GiB) on startup is less than desired CPU memory utilization "
     "(0.92, 21.5 GiB).", "memory-taken", "device 0: 2.1 of 23.4 GiB", "--gpu-memory-utilization"),
    ("Available memory on node 0 (2.1/23.4 GiB) on kv cache allocation is less than requested memory for kv (8.0 GiB).",
     "memory-taken", "NUMA node 0", "--kv-cache"),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.1 GiB",
     "out-of-memory", "1.50 GiB", "--what-if"),
    ("RuntimeError: NPU out of memory. Tried to allocate 784.00 MiB (NPU 3; 60.96 GiB total capacity", "out-of-memory",
     "784.00 MiB", "--gpu-memory-utilization"),
    ("ValueError: Weight input_size_per_partition=7392 for layer 'model.layers.0.mlp.down_proj' is not divisible by "
     "group_size=128. This happens when tensor_parallel_size splits the layer", "group-alignment",
     "'model.layers.0.mlp.down_proj' into 7392 inputs, not a whole number of quantization groups of 128", "--requantize"),
    ("ValueError: Weight input_size_per_partition=704 is not divisible by group_size=128.", "group-alignment",
     "a row-parallel layer", "--ep"),
    ("ValueError: The input size is not aligned with the quantized weight shape. This can be caused by too large tensor "
     "parallel size.", "group-alignment", "inside a quantization group", "--tp"),
    ("Value error, Total number of attention heads (14) must be divisible by tensor parallel size (4).", "head-alignment",
     "14 attention heads cannot be cut into 4", "divides 14"),
    ("AssertionError: Not enough allowed NUMA nodes to bind threads of 2 local CPUWorkers.", "numa", "2 workers",
     "VLLM_CPU_OMP_THREADS_BIND"),
    ("RuntimeError: [enforce fail at gloo/transport/tcp/device.cc:84] ifa != nullptr. Unable to find address for: eth9",
     "interface", "'eth9'", "ip -brief address"),
    ("NCCL WARN Bootstrap : no socket interface found", "interface", "NCCL_SOCKET_IFNAME", "ip -brief address"),
    ("Communication_Error_Get_Socket(EI0006): Getting socket times out. Reason: 1. The remote does not initiate",
     "hccl-connect", "EI0006", "HCCL_CONNECT_TIMEOUT"),
    ("[ERROR] EI0002: The wait execution of the Notify register times out", "hccl-execute", "EI0002", "HCCL_EXEC_TIMEOUT"),
    ("RuntimeError: [pair.cc:553] Connection closed by peer [10.77.0.2]:46778. This is typically caused by a remote "
     "worker crashing.", "peer-lost", "10.77.0.2", "transload launch"),
    ("[c10d] The client socket has timed out after 600000ms while trying to connect to (10.0.0.1, 29501).",
     "peer-timeout", "not all nodes joined", "--master-port"),
    ("RuntimeError: The server socket has failed to listen on any local network address. port: 29501, useIpv6: false, "
     "code: -98, name: EADDRINUSE, message: address already in use", "master-port-in-use", "29501", "ss -ltnp"),
    ("ERROR: [Errno 98] error while attempting to bind on address ('0.0.0.0', 8000): address already in use",
     "port-in-use", "8000", "--port"),
    ("OSError: [Errno 98] Address already in use", "port-in-use", "in use", "--port"),
    ("ValueError: Following weights were not initialized from checkpoint: {'model.layers.1.mlp.up_proj.weight'}",
     "missing-tensors", "model.layers.1.mlp.up_proj.weight", "transload inspect"),
    ("ValueError: There is no module or parameter named 'model.wrong' in Qwen2ForCausalLM.", "missing-tensors",
     "'model.wrong'", "transload port"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata", "damaged", "damaged",
     "download"),
    ("ValueError: Failed to find a kernel that can implement the WNA16 linear layer. Reasons:", "no-kernel", "WNA16 linear",
     "transload port"),
    ("ValueError: Model architectures ['FooForCausalLM'] are not supported for now. Supported", "architecture-unknown",
     "FooForCausalLM", "newer"),
    ("vllm serve: error: unrecognized arguments: --bogus", "bad-argument", "--bogus", "plan and render again"),
    ("importlib.metadata.PackageNotFoundError: No package metadata was found for vllm", "no-metadata", "vllm", "install"),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 11040).", "driver", "too old", "nvidia-smi"),
    ("OSError: [Errno 28] No space left on device", "shared-memory", "full", "--shm-size"),
    ("    assert self.intermediate_tensors is not None", "assertion", "pipeline", "--pp 1"),
)  # fmt: skip


@pytest.mark.parametrize(("line", "name", "sentence", "step"), CASES, ids=[f"{c[1]}-{i}" for i, c in enumerate(CASES)])
def test_known_failures(line: str, name: str, sentence: str, step: str) -> None:
    found = explain(["loading", f"(EngineCore pid=7) ERROR 11-22 07:02:29 [core.py:1] {line}", "bye"], 1)
    assert found.name == name
    assert sentence in found.sentence
    assert step in found.next_step
    assert "{" not in found.sentence.replace(line, "") or "{'model" in found.sentence
    assert found.evidence == line[:500]


def test_every_row_has_a_case() -> None:
    assert {row.name for row in ROWS} - {case[1] for case in CASES} <= {"hccl-port", "quantization-unknown"}


def test_a_cause_beats_what_follows_from_it() -> None:
    lines = [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
        "RuntimeError: Engine core initialization failed. See root cause above.",
        "Connection closed by peer [10.0.0.2]:1",
    ]
    assert explain(lines, 1).name == "out-of-memory"


@pytest.mark.parametrize(
    ("code", "name"), [(-9, "killed"), (-7, "shared-memory"), (-11, "signal"), (3, "unknown"), (None, "not-healthy")]
)
def test_an_unknown_failure_tells_its_code_and_last_error(code: int | None, name: str) -> None:
    found = explain(["INFO fine", "ValueError: something new", "bye"], code)
    assert found.name == name
    assert "ValueError: something new" in found.sentence
