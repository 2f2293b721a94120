"""Runs inside vLLM's environment: reads cases as JSON on stdin, answers with vLLM's own KV arithmetic on stdout.

A case is {stages: [{layer: cache}], available, max_len, in_flight, dcp, mode, speculative}. Kinds of caches: full, mla,
indexer, sliding, chunked, state.
"""

import json
import sys
from types import SimpleNamespace

import torch
from vllm.v1.core import kv_cache_utils as utils
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)


def spec(c, case):
    if c["kind"] == "state":
        extra = {"num_speculative_blocks": case["speculative"], "mamba_cache_mode": case["mode"]}
        return MambaSpec(
            block_size=c["block"],
            shapes=((c["bytes"],),),
            dtypes=(torch.uint8,),
            page_size_padded=c.get("padded"),
            **extra,
        )
    if c["kind"] in ("mla", "indexer"):
        return MLAAttentionSpec(
            block_size=c["block"], num_kv_heads=1, head_size=c["bytes"], dtype=torch.uint8, max_tp_shards=1
        )
    common = {"block_size": c["block"], "num_kv_heads": 1, "head_size": c["bytes"] // 2, "dtype": torch.uint8}
    if c["kind"] == "sliding":
        return SlidingWindowSpec(**common, sliding_window=c["span"], dcp_sharded=False)
    if c["kind"] == "chunked":
        return ChunkedLocalAttentionSpec(**common, attention_chunk_size=c["span"])
    return FullAttentionSpec(**common)


def answer(case):
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            max_model_len=case["max_len"],
            original_max_model_len=case["max_len"],
            hf_config=SimpleNamespace(model_type=""),
        ),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        parallel_config=SimpleNamespace(decode_context_parallel_size=case["dcp"], tensor_parallel_size=case["dcp"]),
        cache_config=SimpleNamespace(
            num_gpu_blocks_override=None,
            mamba_cache_mode=case["mode"],
            prefix_cache_retention_interval=None,
            get_resolved_kv_cache_layout=lambda: utils.KVCacheLayout.LBHNC,
        ),
        attention_config=SimpleNamespace(hisparse_config=None),
        speculative_config=None,
        num_prefill_lookahead_tokens=0,
        max_in_flight_tokens=case["in_flight"],
    )
    specs = [{name: spec(c, case) for name, c in stage.items()} for stage in case["stages"]]
    try:
        configs = utils.get_kv_cache_configs(config, specs, case["available"])
    except ValueError as error:
        return {"error": str(error)}
    scheduler = utils.generate_scheduler_kv_cache_config(configs)
    tokens, concurrency = utils.get_kv_cache_capacity(config, scheduler)
    return {"blocks": scheduler.num_blocks, "tokens": tokens, "concurrency": concurrency}


print("ANSWERS " + json.dumps([answer(case) for case in json.load(sys.stdin)]))
