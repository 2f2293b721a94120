"""Runs inside vLLM's environment: loads models with vLLM's own loader and prints the parameter bytes of every rank.

Usage: vllm_weights.py TP PORT RANK DIR [DIR ...]. TP processes (one a rank) form a real gloo group. Weights are vLLM's
dummy weights; everything after them (sharding, repacking by kernels) is what an engine does.
"""

import json
import os
import sys

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import base_loader, get_model

loaded = {}
_process = base_loader.process_weights_after_loading


def remember(model, *arguments):
    """Parameter sizes before kernels repack them: oneDNN moves float weights into buffers that are no parameters."""
    loaded.update({name: p.numel() * p.element_size() for name, p in model.named_parameters()})
    _process(model, *arguments)


base_loader.process_weights_after_loading = remember
tp, port, rank = (int(x) for x in sys.argv[1:4])
os.environ.setdefault("VLLM_DIST_IDENT", f"plan-{port}")
torch.set_num_threads(1)
torch.accelerator.empty_cache = lambda: None  # there is no accelerator; vLLM's CPU worker replaces it as well
for index, folder in enumerate(sys.argv[4:]):
    args = EngineArgs(
        model=folder,
        skip_tokenizer_init=True,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=256,
        dtype="bfloat16",
    )
    config = args.create_engine_config()
    config.parallel_config.tensor_parallel_size = tp
    with set_current_vllm_config(config):
        if index == 0:
            where = f"tcp://127.0.0.1:{port}"
            parallel_state.init_distributed_environment(tp, rank, where, rank, backend="gloo")
            parallel_state.initialize_model_parallel(tp)
        config.compilation_config.static_forward_context.clear()
        loaded.clear()
        model = get_model(vllm_config=config)
    after = {name: p.numel() * p.element_size() for name, p in model.named_parameters()}
    sizes = {name: size or loaded[name] for name, size in after.items()}
    print("SIZES " + json.dumps({"folder": folder, "rank": rank, "sizes": sizes}), flush=True)
os._exit(0)
