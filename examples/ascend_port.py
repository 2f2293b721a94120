"""A checkpoint for NVIDIA's stack, made ready for vllm-ascend on Atlas 800 A2 or A3.

    python examples/ascend_port.py Qwen3-30B-A3B-GPTQ-Int4 Qwen3-30B-A3B-ascend
    python examples/ascend_port.py Qwen3-30B-A3B-GPTQ-Int4 Qwen3-30B-A3B-ascend --requantize auto

vllm-ascend loads no GPTQ and no AWQ, and its current release multiplies 4-bit weights in experts only, with one scale
per output and int8 activations. Weights in groups therefore cannot move exactly. The first command says so, module by
module, and writes nothing; the second writes attention and dense layers as W8A8, routed experts as W4A8, and reports
the error of every module and the precision that vllm-ascend runs it in. To run the checkpoint on the NPU with its own
numbers instead, see examples/ascend_run.py.
"""

from __future__ import annotations

import argparse
import sys

import transload
from transload.errors import TransloadError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="GPTQ, AWQ, compressed-tensors, GGUF, ... folder or file")
    parser.add_argument("target", help="folder to write")
    parser.add_argument("--release", default="vllm-ascend==main", help="vllm-ascend==0.23 or vllm-ascend==main")
    parser.add_argument("--requantize", help="auto, or schemes: int8-channel-a8, experts=int4-channel-a8")
    parser.add_argument("--overwrite", action="store_true")
    asked = parser.parse_args(arguments)
    try:
        report = transload.port(
            asked.source, asked.target, to=asked.release, requantize=asked.requantize, overwrite=asked.overwrite
        )
    except TransloadError as e:
        print(f"not ported: {e}", file=sys.stderr)
        return 1
    print(report)
    for kind in report.executed:
        print(f"{kind.modules} x {kind.written} runs as {kind.executed} ({kind.kernel})")
    for note in report.notes:
        print(f"note: {note}")
    print(f"serve it: vllm serve {asked.target} --quantization ascend")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
