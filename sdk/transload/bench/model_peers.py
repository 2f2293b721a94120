"""Other people's engines on the same model file: loaded as their own users load them, on the processor.

This file also runs alone in another environment (model_worker.py), where transload is not installed: it imports nothing
from it, and nothing heavy at the top. An engine that is not there, or that cannot read the model, raises; the message
is reported in its place. What Transload and transformers do stands in model_torch.py, which needs this environment.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Job:
    """path: the checkpoint. onnx: a folder for onnxruntime-genai. context: tokens of prompt and answer together."""

    path: str
    onnx: str
    threads: int
    context: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Seconds to the first token, and of all further ones. Token ids; None: the engine's `tokens` tells them."""

    prompt_seconds: float
    decode_seconds: float
    tokens: list[int] | None


class LeftOut(Exception):
    """Why an engine takes no part, a sentence of ours."""


class Engine(Protocol):
    """A loaded model. weight_bytes: what one decoded token reads, None where the file's own size says it."""

    versions: dict[str, str]
    detail: str
    weight_bytes: int | None

    def answer(self, ids: list[int], text: str, new: int) -> Answer:
        """Greedy, exactly `new` tokens after the prompt, nothing remembered from earlier prompts."""


class XLlama:
    """llama.cpp's server as the package xllamacpp ships it, with the server's own timings."""

    weight_bytes: int | None = None

    def __init__(self, job: Job) -> None:
        library = import_module("xllamacpp")
        params = library.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = job.path, job.context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
        params.warmup, params.verbosity = False, 0
        # Nothing may be kept from one prompt to the next: neither in the slot, nor in memory, nor as a checkpoint.
        params.cache_prompt = params.cache_idle_slots = False
        params.cache_ram_mib = params.n_ctx_checkpoints = 0
        self._server = library.Server(params)
        self._tokens: list[int] = []
        self.versions = {"xllamacpp": version("xllamacpp")}
        self.detail = _instructions(library.get_system_info())

    def answer(self, ids: list[int], text: str, new: int) -> Answer:
        """Raises RuntimeError when the server did not compute all of it."""
        timings = self._server.handle_completions(self._request(ids, new))["timings"]
        if timings["cache_n"] or timings["prompt_n"] != len(ids) or timings["predicted_n"] != new:
            raise RuntimeError(f"the server computed {timings['prompt_n']} + {timings['predicted_n']} tokens")
        return Answer(timings["prompt_ms"] / 1e3, timings["predicted_ms"] / 1e3, None)

    def tokens(self, ids: list[int], new: int) -> list[int]:
        """The token ids of the answer, which the server tells only with probabilities, for which it takes longer."""
        if len(self._tokens) < new:
            told = self._server.handle_completions({**self._request(ids, new), "logprobs": 1})
            self._tokens = [int(t["id"]) for t in told["choices"][0]["logprobs"]["content"]]
        return self._tokens

    def _request(self, ids: list[int], new: int) -> dict[str, Any]:
        return {
            "prompt": ids, "n_predict": new, "cache_prompt": False, "ignore_eos": True, "temperature": 0,
            "samplers": ["top_k"], "top_k": 1, "repeat_penalty": 1.0,
        }  # fmt: skip


class LlamaCppPython:
    """llama.cpp through llama-cpp-python: the C functions that llama-bench calls, and the largest logit."""

    weight_bytes: int | None = None

    def __init__(self, job: Job) -> None:
        self._c, self._np = import_module("llama_cpp"), import_module("numpy")
        self._model = self._c.Llama(
            job.path, n_ctx=job.context, n_batch=job.context, n_ubatch=512, n_threads=job.threads,
            n_threads_batch=job.threads, n_gpu_layers=0, verbose=False,
        )  # fmt: skip
        self.versions = {"llama-cpp-python": version("llama-cpp-python")}
        self.detail = _instructions(self._c.llama_print_system_info().decode())

    def answer(self, ids: list[int], text: str, new: int) -> Answer:
        """One batch for the prompt, then a token at a time."""
        c, context = self._c, self._model.ctx
        c.llama_memory_clear(c.llama_get_memory(context), True)
        start = time.perf_counter()
        tokens = [self._next(ids)]
        first = time.perf_counter()
        while len(tokens) < new:
            tokens.append(self._next(tokens[-1:]))
        return Answer(first - start, time.perf_counter() - first, tokens)

    def _next(self, ids: list[int]) -> int:
        c, context = self._c, self._model.ctx
        tokens = (c.llama_token * len(ids))(*ids)  # the batch only points at them
        if c.llama_decode(context, c.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = c.llama_get_logits_ith(context, -1)
        return int(self._np.ctypeslib.as_array(logits, shape=(self._model.n_vocab(),)).argmax())


class Genai:
    """onnxruntime-genai on a folder that its own loader reads."""

    weight_bytes: int | None = None

    def __init__(self, job: Job) -> None:
        if not job.onnx:
            raise LeftOut("it reads a folder of its own: give --onnx FOLDER (`transload port --to onnx`)")
        self._library, self._np = import_module("onnxruntime_genai"), import_module("numpy")
        config = self._library.Config(job.onnx)
        config.clear_providers()
        threads = {"intra_op_num_threads": job.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": threads}}}))
        self._model = self._library.Model(config)
        self.versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime")}
        self.detail = f"the folder {Path(job.onnx).name}, which may hold other numbers"

    def answer(self, ids: list[int], text: str, new: int) -> Answer:
        """The prompt in one step, then a token at a time."""
        params = self._library.GeneratorParams(self._model)
        total = len(ids) + new
        params.set_search_options(do_sample=False, max_length=total, min_length=total)
        generator = self._library.Generator(self._model, params)
        start = time.perf_counter()
        generator.append_tokens(self._np.array([ids], self._np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new - 1):
            generator.generate_next_token()
        end = time.perf_counter()
        return Answer(first - start, end - first, [int(t) for t in generator.get_sequence(0)[len(ids) :]])


def _own(kind: str) -> Callable[[Job], Engine]:
    """What needs this environment: Transload, and transformers on the dequantized weights."""

    def load(job: Job) -> Engine:
        engine: Engine = getattr(import_module("transload.bench.model_torch"), kind)(job)
        return engine

    return load


@dataclass(frozen=True, slots=True)
class Contender:
    """name as shown; module: what must be importable; own: it runs in this environment only."""

    name: str
    module: str
    load: Callable[[Job], Engine]
    own: bool = False
    reads_gguf: bool = False  # and nothing else


CONTENDERS = (
    Contender("transload w4a16", "transload", _own("w4a16"), own=True),
    Contender("transload w4a8", "transload", _own("w4a8"), own=True),
    Contender("transformers bf16", "transload", _own("bf16"), own=True),
    Contender("transformers fp32", "transload", _own("fp32"), own=True),
    Contender("llama.cpp, xllamacpp", "xllamacpp", XLlama, reads_gguf=True),
    Contender("llama-cpp-python", "llama_cpp", LlamaCppPython, reads_gguf=True),
    Contender("onnxruntime-genai", "onnxruntime_genai", Genai),
)


def contender(name: str) -> Contender:
    """The contender of a name that is in CONTENDERS."""
    return next(c for c in CONTENDERS if c.name == name)


def _instructions(system_info: str) -> str:
    """The instruction sets that a build of llama.cpp says it uses: "CPU : AVX2 = 1 | FMA = 1" -> "AVX2 FMA"."""
    last = system_info.rpartition(" : ")[2]
    names = [part.partition("=") for part in last.split("|")]
    return " ".join(name.strip() for name, _, value in names if value.strip() == "1")


def first_line(e: Exception) -> str:
    """An error as one line."""
    told = str(e) if isinstance(e, LeftOut) else f"{type(e).__name__}: {e}"
    return told.splitlines()[0][:300]
