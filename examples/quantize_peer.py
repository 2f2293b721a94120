"""The same quantization by llm-compressor, timed: int4 symmetric in groups, GPTQ or AWQ, on the same windows of text.

    peers/bin/python examples/quantize_peer.py model-bf16-folder windows.pt out [--awq] [--group 64]

Runs in an environment that has llm-compressor (and not Transload). windows.pt holds int64 [count, tokens], made by
examples/quantize_quality.py. Prints seconds and peak memory; `out` is a compressed-tensors checkpoint.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("windows")
    parser.add_argument("out")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--awq", action="store_true")
    options = parser.parse_args()
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from transformers import AutoModelForCausalLM

    ids = torch.load(options.windows)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    data.set_format("torch")
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    start = time.perf_counter()
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": options.group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if options.awq:
        recipe = [AWQModifier(), QuantizationModifier(config_groups=groups, ignore=["lm_head"])]
        if not torch.accelerator.is_available():
            # Its AWQ pins memory for a transfer to an accelerator, which torch refuses where there is none.
            torch.Tensor.pin_memory = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    else:
        recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"], dampening_frac=0.01)
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        output_dir=options.out,
    )
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    print(f"llm-compressor: {seconds:.0f} s, {cpu:.0f} s of CPU, peak memory {peak:.2f} GB")


if __name__ == "__main__":
    main()
