"""A quantized checkpoint of any vendor, run on an Ascend NPU with the numbers that it has.

    python examples/ascend_run.py Qwen3-30B-A3B-GPTQ-Int4 --prompt "What is the capital of France?"

Source CANN's set_env.sh first. Nothing is converted on disk: weights are packed for the NPU's operators while they
load. What runs in the end, and why anything differs from what the checkpoint asks for, is printed before the answer.
"""

from __future__ import annotations

import argparse

import torch

import transload
from transload.runtime import report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="folder or GGUF file")
    parser.add_argument("--device", default="npu:0")
    parser.add_argument("--scheme", choices=["w4a16", "w4a8"], help="activations; default: as the checkpoint says")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--tokens", type=int, default=64)
    asked = parser.parse_args(arguments)
    # bfloat16 activations take scales of every dtype; float16 ones need float16 scales.
    model = transload.load(asked.checkpoint, device=asked.device, scheme=asked.scheme, dtype=torch.bfloat16)
    print(report(model))
    answer = transload.generate(
        model, asked.prompt, asked.tokens, stream=lambda piece: print(piece, end="", flush=True)
    )
    print(f"\n{len(answer.tokens)} tokens, {answer.tokens_per_second:.1f} a second")


def show(piece: str) -> None:
    print(piece, end="", flush=True)


if __name__ == "__main__":
    main()
