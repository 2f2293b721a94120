"""Ports of a checkpoint as wide as GLM-5, timed beside cp, with their memory; and one that is killed ten times.

    python ci/port_scale.py make FOLDER [--experts 256] [--layers 2]      # INT4 compressed-tensors, 10 GB by default
    python ci/port_scale.py time FOLDER --work DIR                        # GB/s of ports and of cp, interleaved
    python ci/port_scale.py kill FOLDER --work DIR [--times 10]           # kills, resumes, compares bytes

The checkpoint has GLM-5's real widths and names and random codes; it is never loaded by a model.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from transload.writer import Writer

HIDDEN, MOE, Q_LORA, KV_LORA, HEADS, VOCAB = 6144, 2048, 2048, 512, 64, 8192  # VOCAB is cut down: it stays float
GROUP = 128
TARGETS = ("compressed-tensors", "gptq", "msmodelslim")
CHILD = """
import sys, time, torch
torch.set_num_threads(1)
import transload
from transload.memory import peak_memory
base = peak_memory()
start = time.perf_counter()
transload.port(sys.argv[1], sys.argv[2], to=sys.argv[3], resume="resume" in sys.argv)
print(time.perf_counter() - start, peak_memory(), base)
"""


def linears(layers: int, experts: int) -> Iterator[tuple[str, int, int]]:
    """Name, N and K of every quantized linear."""
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_a_proj", Q_LORA, HIDDEN
        yield f"{at}.self_attn.q_b_proj", HEADS * 256, Q_LORA
        yield f"{at}.self_attn.kv_a_proj_with_mqa", KV_LORA + 64, HIDDEN
        yield f"{at}.self_attn.kv_b_proj", HEADS * (192 + 256), KV_LORA
        yield f"{at}.self_attn.o_proj", HIDDEN, HEADS * 256
        for name in ("shared_experts", *(f"experts.{e}" for e in range(experts))):
            yield f"{at}.mlp.{name}.gate_proj", MOE, HIDDEN
            yield f"{at}.mlp.{name}.up_proj", MOE, HIDDEN
            yield f"{at}.mlp.{name}.down_proj", HIDDEN, MOE


def floats(layers: int, experts: int) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    """Tensors that stay as they are, buffers included."""
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN), torch.bfloat16
    yield "model.norm.weight", (HIDDEN,), torch.bfloat16
    yield "lm_head.weight", (VOCAB, HIDDEN), torch.bfloat16
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.input_layernorm.weight", (HIDDEN,), torch.bfloat16
        yield f"{at}.post_attention_layernorm.weight", (HIDDEN,), torch.bfloat16
        yield f"{at}.self_attn.q_a_layernorm.weight", (Q_LORA,), torch.bfloat16
        yield f"{at}.self_attn.kv_a_layernorm.weight", (KV_LORA,), torch.bfloat16
        yield f"{at}.mlp.gate.weight", (experts, HIDDEN), torch.bfloat16
        yield f"{at}.mlp.gate.e_score_correction_bias", (experts,), torch.float32


def make(folder: Path, layers: int, experts: int) -> None:
    """Writes the checkpoint: words of random codes, scales near 0.01."""
    plan = {name: (dtype, shape) for name, shape, dtype in floats(layers, experts)}
    for name, n, k in linears(layers, experts):
        plan |= {
            f"{name}.weight_packed": (torch.int32, (n, k // 8)),
            f"{name}.weight_scale": (torch.bfloat16, (n, k // GROUP)),
            f"{name}.weight_shape": (torch.int64, (2,)),
        }
    generator = torch.Generator().manual_seed(0)
    with Writer(folder, plan) as writer:
        for name, (dtype, shape) in plan.items():
            if name.endswith("weight_shape"):
                n, groups = plan[name.replace("weight_shape", "weight_scale")][1]
                writer.add(name, torch.tensor([n, groups * GROUP]))
            else:
                writer.add(name, _value(name, dtype, shape, generator))
        writer.add_json("config.json", _config(layers, experts))


def _value(name: str, dtype: torch.dtype, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if name.endswith("weight_packed"):
        return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=generator).to(dtype)
    if name.endswith("weight_scale"):
        return (torch.rand(shape, generator=generator) * 0.01 + 0.005).to(dtype)
    return (torch.randn(shape, generator=generator) * 0.02).to(dtype)


def _config(layers: int, experts: int) -> dict[str, object]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    return {
        "architectures": ["GlmMoeDsaForCausalLM"], "model_type": "glm_moe_dsa", "hidden_size": HIDDEN,
        "intermediate_size": 12288, "moe_intermediate_size": MOE, "num_hidden_layers": layers,
        "first_k_dense_replace": 0, "n_routed_experts": experts, "num_experts_per_tok": 8, "n_shared_experts": 1,
        "q_lora_rank": Q_LORA, "kv_lora_rank": KV_LORA, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256, "vocab_size": VOCAB,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
            "ignore": ["lm_head", "re:.*mlp.gate$"],
        },
    }  # fmt: skip


def measure(folder: Path, work: Path, rounds: int) -> None:
    """Every port and cp in turn, `rounds` times; the files' bytes over the median of the seconds."""
    nbytes = sum(f.stat().st_size for f in folder.iterdir())
    seconds: dict[str, list[float]] = {name: [] for name in ("cp", *TARGETS)}
    memory: dict[str, int] = {}
    for _ in range(rounds):
        for name, times in seconds.items():
            out = work / f"out-{name}"
            if name == "cp":
                start = time.perf_counter()
                subprocess.run(["cp", "-r", str(folder), str(out)], check=True)
                os.sync()
                times.append(time.perf_counter() - start)
            else:
                took, peak, base = _port(folder, out, name)
                times.append(took)
                memory[name] = max(memory.get(name, 0), peak - base)
            print(f"  {name}: {times[-1]:.1f} s", file=sys.stderr, flush=True)
            shutil.rmtree(out)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"{nbytes / 1e9:.2f} GB, {rounds} rounds, medians\n")
    print("| | seconds | GB/s | of cp | peak memory above import |\n| --- | ---: | ---: | ---: | ---: |")
    for name, value in middle.items():
        above = f"{memory[name] / 1e6:.0f} MB" if name in memory else ""
        print(f"| {name} | {value:.1f} | {nbytes / 1e9 / value:.2f} | {middle['cp'] / value:.2f} | {above} |")


def _port(folder: Path, out: Path, target: str) -> tuple[float, int, int]:
    command = [sys.executable, "-c", CHILD, str(folder), str(out), target]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    took, peak, base = done.stdout.split()
    return float(took), int(peak), int(base)


def kill(folder: Path, work: Path, times: int, target: str, seed: int) -> None:
    """Kills a port at random moments and resumes it, then compares every byte with an undisturbed one."""
    whole, _, _ = _port(folder, work / "undisturbed", target)
    chance = random.Random(seed)
    out, command = work / "killed", [sys.executable, "-c", CHILD, str(folder), str(work / "killed"), target, "resume"]
    killed = 0
    while killed < times:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            child.wait(chance.uniform(0.1, 0.9) * whole)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.wait()
            killed += 1
            assert not out.exists(), "a killed port must leave nothing under its final name"
            print(f"  killed {killed}", file=sys.stderr, flush=True)
        else:
            assert child.returncode == 0
            _compare(work / "undisturbed", out)
            shutil.rmtree(out)
    _port_again(command)
    _compare(work / "undisturbed", out)
    print(json.dumps({"target": target, "killed": killed, "seconds_undisturbed": round(whole, 1), "equal": True}))


def _port_again(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _compare(a: Path, b: Path) -> None:
    names = [sorted(p.name for p in folder.iterdir()) for folder in (a, b)]
    assert names[0] == names[1], names
    for name in names[0]:
        assert _digest(a / name) == _digest(b / name), f"{name} differs"


def _digest(path: Path) -> str:
    out = sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            out.update(piece)
    return out.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("make", "time", "kill"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("port-scale"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--target", default="gptq", choices=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.what == "make":
        make(options.folder, options.layers, options.experts)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if options.what == "time":
        measure(options.folder, options.work, options.rounds)
    else:
        kill(options.folder, options.work, options.times, options.target, options.seed)


if __name__ == "__main__":
    main()
