"""Searches the best configuration of a product on this GPU. Only ever runs when asked; findings are remembered."""

from __future__ import annotations

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.hal import Packed
from transload_cuda import configs
from transload_cuda.configs import Config

WARMUP_MS, REPEAT_MS = 5, 20


def tune(x: Tensor, w: Packed, counts: Tensor | None = None) -> Config:
    """The fastest configuration for rows like x, stored in `configs.cache_file` for later products of its bucket.

    x: [M, K] on a GPU; w: placed there by a Triton kernel. Candidates that do not compile or fit are passed over.
    Raises ConfigError without a GPU: times of the interpreter say nothing.
    """
    if not x.is_cuda:
        raise ConfigError(f"tune: x is on {x.device}; times are taken on a CUDA device only")
    from triton.testing import do_bench

    from transload_cuda.jit import launch

    ask = launch.ask(x, w.spec, w.n, counts)
    best, least = configs.fitted(configs.default(ask), ask), float("inf")
    for config in (best, *configs.candidates(ask)):
        try:
            ms = do_bench(
                lambda c=config: launch.multiply(x, w.tensors, w.spec, w.n, None, counts, c),
                warmup=WARMUP_MS,
                rep=REPEAT_MS,
                return_mode="median",
            )
        except (launch.OutOfResources, torch.OutOfMemoryError):
            continue
        if ms < least:
            best, least = config, ms
    configs.remember(torch.cuda.get_device_name(x.device), ask.key, best)
    return best
