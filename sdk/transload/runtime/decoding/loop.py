"""The loop of generation for one sequence, which transformers' generate calls in the place of its own.

Transformers prepares everything (settings, processors of logits, criteria for the end, cache); only what it does around
every token is left out here: masks, positions and copies of the inputs that one sequence does not need.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from transload.runtime.decoding.stepwise import StepwiseModel


def suits(model: PreTrainedModel, settings: GenerationConfig) -> bool:
    """Whether `one_sequence` may take the place of transformers' loop: greedy or sampled, on a model with a step."""
    inner = getattr(model, model.base_model_prefix, None)
    if not isinstance(inner, StepwiseModel) or inner.reason is not None or settings.return_dict_in_generate:
        return False
    plain = settings.cache_implementation in (None, "dynamic") and settings.use_cache is not False
    return plain and settings.get_generation_mode() in ("greedy_search", "sample")


def one_sequence(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    past_key_values: Any = None,
    listener: Any = None,
    **_: Any,
) -> Tensor:
    """Token ids int64 [1, T] with the new ones behind the prompt's; for generate's argument `custom_generate`.

    listener: a streamer, by another name, because generate keeps `streamer` from such functions.
    """
    if listener is not None:
        listener.put(input_ids)
    if past_key_values is None:  # transformers before 5.1 leaves that to the model
        past_key_values = DynamicCache(config=model.config)
    n = input_ids.shape[1]
    most, ends, others = _criteria(stopping_criteria)
    ids = torch.empty(1, most, dtype=torch.int64)
    ids[:, :n] = input_ids
    start = past_key_values.get_seq_length()
    out = model(input_ids[:, start:], past_key_values=past_key_values, use_cache=True, logits_to_keep=1)
    while True:
        token = _chosen(out.logits[:, -1].float(), ids[:, :n], logits_processor, bool(generation_config.do_sample))
        ids[:, n : n + 1] = token
        n += 1
        if listener is not None:
            listener.put(token[0])
        if n >= most or int(token) in ends or (others and bool(others(ids[:, :n], None).all())):
            break
        out = model(token, past_key_values=past_key_values, use_cache=True)
    if listener is not None:
        listener.end()
    return ids[:, :n]


def _chosen(scores: Tensor, ids: Tensor, processors: LogitsProcessorList, sample: bool) -> Tensor:
    """The next token int64 [1, 1]."""
    if processors or sample:
        with _one_thread():
            scores = processors(ids, scores)
            if sample:
                return torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1)
    return torch.tensor([[int(scores[0].numpy().argmax())]])


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread: its others look for more work for milliseconds, on processors that the next token needs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _criteria(criteria: StoppingCriteriaList) -> tuple[int, set[int], StoppingCriteriaList]:
    """The length at which to stop, the tokens that end a text, and whatever else there is."""
    most = min(c.max_length for c in criteria if type(c) is MaxLengthCriteria)
    ends = {int(t) for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id}
    others = [c for c in criteria if type(c) not in (MaxLengthCriteria, EosTokenCriteria)]
    return most, ends, StoppingCriteriaList(others)
