"""Peak memory and time while quantizing models as wide as 7B ones, with random weights.

    python examples/quantize_memory.py work --layers 0                         # four layers, GPTQ for the first
    python examples/quantize_memory.py work --shape qwen2-7b --method rtn      # 15 GB on disk, and 4 GB written
    python examples/quantize_memory.py work --shape qwen2-7b --stop-after 4    # killed then; run again, it goes on

Prints seconds and peak memory of every layer, the size of a layer, of the calibration cache (hidden states and
Hessians), how far the process grew, and in which lines of the code it was largest. Memory is what is no mapped file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from transload.quantize import Recipe, quantize


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides about memory: the widths, heads of queries and of keys, layers and vocabulary."""

    hidden: int
    wide: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """[N, K] of a layer's linears."""
        narrow = self.hidden // self.heads * self.kv_heads
        shapes = {f"self_attn.{n}_proj": (self.hidden, self.hidden) for n in "qo"}
        shapes |= {f"self_attn.{n}_proj": (narrow, self.hidden) for n in "kv"}
        shapes |= {f"mlp.{n}_proj": (self.wide, self.hidden) for n in ("gate", "up")}
        return shapes | {"mlp.down_proj": (self.hidden, self.wide)}

    @property
    def layer_bytes(self) -> int:
        """Of a layer in bfloat16."""
        return 2 * sum(n * k for n, k in self.linears.values())


SHAPES = {
    "llama-7b-wide": Shape(4096, 11008, 32, 32, 4, 2048),
    "qwen2-7b": Shape(3584, 18944, 28, 4, 28, 152064),
}


def model(folder: Path, shape: Shape) -> None:
    """Writes the model, one file a layer. Layers differ by a rotation of the same random numbers, which is quick."""
    if (folder / "model.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.wide, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": shape.layers, "vocab_size": shape.vocab, "max_position_embeddings": 4096,
        "dtype": "bfloat16", "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    where: dict[str, str] = {}

    def save(file: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, folder / file)
        where.update(dict.fromkeys(tensors, file))

    torch.manual_seed(0)
    base = {n: (torch.randn(s) * 0.02).bfloat16() for n, s in shape.linears.items()}
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        layer = {f"{at}{n}.weight": w.roll(i, 0) for n, w in base.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        save(
            f"layer-{i:02d}.safetensors",
            layer | {f"{at}{n}.weight": torch.ones(shape.hidden).bfloat16() for n in norms},
        )
    ends = {"model.norm.weight": torch.ones(shape.hidden).bfloat16()}
    ends["model.embed_tokens.weight"] = torch.randn(shape.vocab, shape.hidden).bfloat16()
    save("ends.safetensors", ends | {"lm_head.weight": torch.randn(shape.vocab, shape.hidden).bfloat16()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def resident() -> int:
    """Bytes of memory of this process that are no mapped file."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class Peak(threading.Thread):
    """The largest `resident` while it runs, in all and since `layer` was called, and where the main thread was."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self.recent, self.where, self.done = 0, 0, "", False

    def run(self) -> None:
        while not self.done:
            now = resident()
            self.recent = max(self.recent, now)
            if now > self.most:
                self.most, self.where = now, self._lines()
            time.sleep(0.02)

    def _lines(self) -> str:
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        stack = traceback.extract_stack(frame) if frame else []
        return " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(stack) if "transload" in f.filename)


class Letters:
    """A tokenizer of characters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


class Watcher:
    """Prints every layer's seconds and memory; ends the process after `stop` layers, as a kill would."""

    def __init__(self, peak: Peak, before: int, stop: int) -> None:
        self._peak, self._before, self._stop = peak, before, stop
        self._began, self._what, self._seen = time.perf_counter(), "", 0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.perf_counter()
        if self._what.startswith("layer"):
            grown = self._peak.recent - self._before
            print(f"{self._what}: {now - self._began:.1f} s, {grown / 1e6:.0f} MB above the start", flush=True)
            self._seen += 1
        self._began, self._what, self._peak.recent = now, what, 0
        if self._stop and self._seen >= self._stop:
            print(f"stopped before {what}; the same command goes on there", flush=True)
            os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama-7b-wide")
    parser.add_argument("--method", choices=("gptq", "awq", "rtn"), default="gptq")
    parser.add_argument("--layers", type=int, nargs="*", help="by the method; the others are rounded, which takes less")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128, help="of a window")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--stop-after", type=int, default=0, metavar="LAYERS")
    options = parser.parse_args()
    work, shape = options.work / options.shape, SHAPES[options.shape]
    began = time.perf_counter()
    model(work / "model", shape)
    print(f"the model is there after {time.perf_counter() - began:.0f} s", flush=True)
    text = work / "text.txt"
    count = options.windows * options.tokens
    text.write_text("".join(chr(40 + (i * i * 31 + i // 7) % 900) for i in range(count)), encoding="utf-8")
    rules = [{"modules": ["*"], "scheme": "int4-g128", "method": options.method}]
    if options.layers:
        rules = [{**rules[0], "layers": options.layers}, {**rules[0], "method": "rtn"}]
    calibration = {"samples": options.windows, "tokens": options.tokens, "precision": options.precision}
    recipe = Recipe(name="memory", rules=rules, calibration=calibration)
    before, peak = resident(), Peak()
    peak.start()
    began, cpu = time.perf_counter(), time.process_time()
    quantize(
        work / "model", work / f"out-{options.method}", recipe, to="transload", calibration=text, tokenizer=Letters(),
        overwrite=True, resume=True, progress=Watcher(peak, before, options.stop_after),
    )  # fmt: skip
    peak.done = True
    layer, grew = shape.layer_bytes, peak.most - before
    hidden = 4 * count * shape.hidden
    hessians = 4 * (3 * shape.hidden**2 + shape.wide**2) if options.method == "gptq" else 0
    print(f"layer: {layer / 1e6:.0f} MB in bfloat16, {2 * layer / 1e6:.0f} MB in float32")
    print(
        f"calibration cache: Hessians {hessians / 1e6:.0f} MB, hidden states 2 x {hidden / 1e6:.0f} MB in mapped files"
    )
    print(
        f"peak above the start: {grew / 1e6:.0f} MB = {(grew - hessians) / (2 * layer):.2f} float32 layers + Hessians"
    )
    print(f"largest at {peak.where}")
    print(f"{time.perf_counter() - began:.0f} s on the clock, {time.process_time() - cpu:.0f} s of CPU")


if __name__ == "__main__":
    main()
