"""The engines of this environment: Transload through its public functions, and transformers on dequantized weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import transload
from transload import checkpoint as checkpoints
from transload.bench.model_bytes import touched_bytes
from transload.bench.model_peers import Answer, Job
from transload.checkpoint import Checkpoint
from transload.errors import Unsupported
from transload.formats.base import Entry
from transload.runtime import generate, load, report, tokenizer
from transload.runtime.floats import LazyTensor, float_state
from transload.runtime.loading import model_class, model_config

NEVER = 2**31 - 1  # a token that no vocabulary has: answers end when they are long enough


class Transload:
    """transload.load and transload.generate, as a caller has them."""

    def __init__(self, scheme: str, job: Job) -> None:
        torch.set_num_threads(job.threads)
        self._model = load(job.path, device="cpu", scheme=scheme)
        self._model.generation_config = _greedy()
        self._tokenizer = tokenizer(self._model)
        ran = report(self._model)
        kernels = dict.fromkeys(f"{m.kernel} {m.executed}" for m in ran.modules if m.kind != "embedding")
        self.versions = {"transload": transload.__version__, "torch": torch.__version__}
        self.detail = ", ".join(kernels) + f"; decoder: {ran.decoder}"
        self.weight_bytes = touched_bytes(self._model)

    def answer(self, ids: list[int], text: str, new: int) -> Answer:
        """The text is tokenized again, as it would be for any caller."""
        told = generate(self._model, text, max_new_tokens=new, chat=False, tokenizer=self._tokenizer)
        if told.prompt_tokens != len(ids):
            raise RuntimeError(f"the prompt has {told.prompt_tokens} tokens here, expected {len(ids)}")
        return Answer(told.prompt_seconds, told.decode_seconds, list(told.tokens))


class Transformers:
    """transformers' own model with the checkpoint's weights as floats of one dtype, and its own generate."""

    def __init__(self, dtype: torch.dtype, job: Job) -> None:
        torch.set_num_threads(job.threads)
        transformers.utils.logging.disable_progress_bar()
        checkpoint = checkpoints.open(job.path, "native")
        config = model_config(checkpoint, trust_remote_code=False)
        model, info = model_class(config, checkpoint.path).from_pretrained(
            None, config=config, state_dict=dequantized_state(checkpoint), dtype=dtype, output_loading_info=True
        )
        if info["missing_keys"]:
            raise Unsupported(
                f"{len(info['missing_keys'])} weights are stored in parts that transformers does not join"
            )
        self._model: PreTrainedModel = model
        model.generation_config = _greedy()
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.detail = f"dequantized weights, {dtype}".replace("torch.", "")
        self.weight_bytes = touched_bytes(model)

    def answer(self, ids: list[int], text: str, new: int) -> Answer:
        """model.generate with a streamer that looks at the clock."""
        given = torch.tensor([ids])
        clock = _Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=new, do_sample=False, streamer=clock
            )
        first = clock.times[1]  # the prompt itself is put first
        return Answer(first - start, clock.times[-1] - first, out[0, len(ids) :].tolist())


w4a16, w4a8 = partial(Transload, "w4a16"), partial(Transload, "w4a8")
bf16, fp32 = partial(Transformers, torch.bfloat16), partial(Transformers, torch.float32)


class _Clock(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """The prompt, then one token at a time."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _greedy() -> GenerationConfig:
    """The likeliest token every time, without the model's own penalties, and never an end."""
    return GenerationConfig(eos_token_id=[NEVER], pad_token_id=0, do_sample=False)


def dequantized_state(checkpoint: Checkpoint) -> dict[str, LazyTensor]:
    """Every tensor as floats by its Hugging Face name, read when it is asked for."""
    state = float_state(checkpoint)
    for entry in checkpoint.entries.values():
        if entry.spec is not None:
            if len(entry.shape) > 2:
                raise Unsupported("stacked quantized experts are not given to transformers as floats here")
            state[f"{entry.name}.weight"] = LazyTensor(entry, _numbers(checkpoint, entry))
    return state


def _numbers(checkpoint: Checkpoint, entry: Entry) -> Callable[[], Tensor]:
    return lambda: checkpoint.decode(entry).dequantize()
