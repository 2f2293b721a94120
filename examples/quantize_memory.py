"""Peak memory while quantizing a model as wide as a 7B one, with four layers of random weights.

    python examples/quantize_memory.py work

Prints the size of a layer, of the calibration cache (hidden states and Hessians), and how far the process grew. All
layers are alike, so only the first is quantized by GPTQ and the others are rounded, which takes less memory.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from transload.quantize import Recipe, quantize

HIDDEN, WIDE, HEADS, LAYERS, VOCAB = 4096, 11008, 32, 4, 2048
WINDOWS, TOKENS = 4, 128


def model(folder: Path) -> int:
    """Writes the model, one file a layer; returns the bytes of a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": WIDE,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "num_hidden_layers": LAYERS, "vocab_size": VOCAB,
        "max_position_embeddings": 4096, "dtype": "bfloat16", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {f"self_attn.{n}_proj": (HIDDEN, HIDDEN) for n in "qkvo"}
    shapes |= {"mlp.gate_proj": (WIDE, HIDDEN), "mlp.up_proj": (WIDE, HIDDEN), "mlp.down_proj": (HIDDEN, WIDE)}
    where: dict[str, str] = {}

    if (folder / "model.safetensors.index.json").exists():
        return 2 * sum(n * k for n, k in shapes.values())

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        if not (folder / file).exists():
            save_file(tensors, folder / file)
        where.update(dict.fromkeys(tensors, file))

    torch.manual_seed(0)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        layer = {f"{at}{n}.weight": (torch.randn(s) * 0.02).bfloat16() for n, s in shapes.items()}
        layer |= {
            f"{at}{n}.weight": torch.ones(HIDDEN).bfloat16() for n in ("input_layernorm", "post_attention_layernorm")
        }
        save(f"layer-{i}.safetensors", layer)
    ends = {"model.embed_tokens.weight": torch.randn(VOCAB, HIDDEN).bfloat16(), "model.norm.weight": torch.ones(HIDDEN)}
    save("ends.safetensors", ends | {"lm_head.weight": torch.randn(VOCAB, HIDDEN).bfloat16()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return 2 * sum(n * k for n, k in shapes.values())


def resident() -> int:
    """Bytes of memory of this process that are no mapped file."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class Peak(threading.Thread):
    """The largest `resident` while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.done = 0, False

    def run(self) -> None:
        while not self.done:
            self.most = max(self.most, resident())
            time.sleep(0.02)


class Letters:
    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % VOCAB for c in text]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    work = parser.parse_args().work
    layer = model(work / "model")
    text = work / "text.txt"
    text.write_text("".join(chr(40 + (i * i * 31 + i // 7) % 900) for i in range(WINDOWS * TOKENS)), encoding="utf-8")
    rules = [{"modules": ["*"], "layers": [0], "scheme": "int4-g128"}]
    rules += [{"modules": ["*"], "scheme": "int4-g128", "method": "rtn"}]
    recipe = Recipe(name="memory", rules=rules, calibration={"samples": WINDOWS, "tokens": TOKENS})
    peak = Peak()
    before = resident()
    peak.start()
    began = time.perf_counter()
    quantize(
        work / "model", work / "out", recipe, to="transload", calibration=text, tokenizer=Letters(), overwrite=True
    )
    peak.done = True
    hidden = 4 * WINDOWS * TOKENS * HIDDEN
    hessians = 4 * (3 * HIDDEN**2 + WIDE**2)
    grew = peak.most - before
    print(f"layer: {layer / 1e6:.0f} MB in bfloat16, {2 * layer / 1e6:.0f} MB in float32")
    print(
        f"calibration cache: Hessians {hessians / 1e6:.0f} MB, hidden states 2 x {hidden / 1e6:.0f} MB in mapped files"
    )
    print(
        f"peak above the start: {grew / 1e6:.0f} MB = {(grew - hessians) / (2 * layer):.2f} float32 layers + Hessians"
    )
    print(f"{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
