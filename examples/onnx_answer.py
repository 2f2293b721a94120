"""Text from a folder that `transload port --to onnx` wrote, with onnxruntime and tokenizers and nothing else.

transload port model.gguf model-onnx --to onnx --requantize auto --activations int8
python examples/onnx_answer.py model-onnx "The capital of France is"
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def answer(folder: Path, prompt: str, most: int) -> tuple[str, float]:
    """The greedy continuation of a prompt, and tokens per second after the first."""
    settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
    ends = settings["eos_token_id"]
    ends = set(ends) if isinstance(ends, list) else {ends}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    session = onnxruntime.InferenceSession(folder / settings["decoder"]["filename"])
    names = [output.name for output in session.get_outputs()]
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
    cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in past}

    ids = np.array([tokenizer.encode(prompt).ids], np.int64)
    tokens, length, start = list[int](), 0, 0.0
    while len(tokens) < most:
        length += ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64), **cache}
        found = dict(zip(names, session.run(None, feeds), strict=True))
        token = int(found.pop("logits")[0, -1].argmax())
        start = start or time.perf_counter()
        if token in ends:
            break
        tokens.append(token)
        cache = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        ids = np.array([[token]], np.int64)
    rate = (len(tokens) - 1) / max(time.perf_counter() - start, 1e-9)
    return tokenizer.decode(tokens), rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    options = parser.parse_args()
    text, rate = answer(options.folder, options.prompt, options.max_new_tokens)
    print(f"{options.prompt}{text}\n{rate:.1f} tokens/s")


if __name__ == "__main__":
    main()
