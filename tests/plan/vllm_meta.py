"""Runs inside vLLM's environment: parameter bytes of one rank of any shape, from vLLM's own model classes.

Models are built on the meta device; the process groups are objects that only know their size and rank, so that no
process has to be started. Reads cases as JSON on stdin: {"config", "tp", "pp", "dp", "ep", "rank", "draft"}; draft
builds the multi-token-prediction model that serves as the drafter. Answers "SIZES [{name: [bytes, dtype]}, ...]".
"""

# ruff: noqa: E402 -- the stub of torchvision comes before everything that imports it

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

for name in ("", ".io", ".ops", ".transforms", ".transforms.functional", ".transforms.v2", ".transforms.v2.functional"):
    stub = sys.modules[f"torchvision{name}"] = MagicMock()  # picture processors import it; no picture is processed
    stub.__spec__, stub.__version__ = ModuleSpec(f"torchvision{name}", None), "0.99"

import torch
import torch.fx.experimental._config
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig
from vllm.config import SpeculativeConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.kernels.linear.scaled_mm.cpu import CPUFp8BlockScaledMMKernel
from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
from vllm.model_executor.model_loader.utils import get_model_architecture, initialize_model
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_default_torch_dtype

torch.set_num_threads(1)
torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True
_backend = type(current_platform).get_attn_backend_cls.__func__


def any_backend(cls, selected_backend, attn_selector_config, num_heads=None):
    """The CPU's attention for every layer, also where it refuses to compute: weights do not depend on it."""
    return _backend(cls, selected_backend, attn_selector_config._replace(use_sparse=False), num_heads)


# The CPU refuses FP8 without AMX; what it would hold is the same everywhere.
CPUFp8BlockScaledMMKernel.is_supported = classmethod(lambda cls, *arguments, **named: (True, None))
torch.nn.Module.to = lambda self, *arguments, **named: self  # everything stays on the meta device
ExpertMapManager.get_compressed_map_string = lambda self: ""  # only for a log line
type(current_platform).get_attn_backend_cls = classmethod(any_backend)


class Group:
    """What model constructors ask of a process group."""

    def __init__(self, size, rank):
        self.world_size, self.rank_in_group, self.rank, self.local_rank = size, rank, rank, rank
        self.ranks, self.unique_name, self.device_group, self.cpu_group = list(range(size)), f"g{size}", self, self
        self.is_first_rank, self.is_last_rank, self.first_rank, self.last_rank = (
            rank == 0,
            rank == size - 1,
            0,
            size - 1,
        )
        self.device, self.device_communicator, self.use_device_communicator = torch.device("meta"), None, False

    def size(self):
        return self.world_size

    def all_gather(self, x, dim=-1):
        return torch.cat([x] * self.world_size, dim)


class Speculative:
    """What a drafter's constructor asks of the speculative configuration; everything else is off."""

    method = "mtp"

    def __init__(self, draft_model_config):
        self.draft_model_config = draft_model_config

    def __getattr__(self, name):
        return None


def groups(case):
    t, p, d, rank = case["tp"], case["pp"], case["dp"], case["rank"]
    tp, stage, dp = rank % t, rank // t % p, rank // (t * p)
    parallel_state._TP, parallel_state._PP, parallel_state._DP = Group(t, tp), Group(p, stage), Group(d, dp)
    parallel_state._PCP, parallel_state._DCP = Group(1, 0), Group(1, 0)
    parallel_state._EP = Group(t * d, dp * t + tp)
    parallel_state._WORLD = Group(t * p * d, rank)
    if hasattr(parallel_state, "_ETP"):
        parallel_state._ETP = Group(t, tp)


def known(config):
    """Lets transformers read a model type that only comes with code of its own."""
    name = config["model_type"]
    if config.get("architectures") and name not in CONFIG_MAPPING:
        AutoConfig.register(name, type("Own", (PretrainedConfig,), {"model_type": name}))


def build(case, folder):
    known(case["config"])
    (folder / "config.json").write_text(json.dumps(case["config"]))
    args = EngineArgs(
        model=str(folder), skip_tokenizer_init=True, load_format="dummy", enforce_eager=True, max_model_len=256,
        dtype="bfloat16", trust_remote_code=False,
        **case.get("arguments", {}),
    )  # fmt: skip
    config = args.create_engine_config()
    parallel = config.parallel_config
    parallel.tensor_parallel_size, parallel.pipeline_parallel_size = case["tp"], case["pp"]
    parallel.data_parallel_size, parallel.enable_expert_parallel = case["dp"], case["ep"]
    parallel.data_parallel_rank = case["rank"] // (case["tp"] * case["pp"])
    parallel.world_size = case["tp"] * case["pp"]
    groups(case)
    model_config = config.model_config
    if case.get("draft"):
        draft = args.create_engine_config().model_config
        draft.hf_config = SpeculativeConfig.hf_config_override(draft.hf_config)
        config.speculative_config = Speculative(draft)
        draft.hf_text_config = draft.hf_config.get_text_config()
        config.model_config = model_config = draft
        draft.model_arch_config = draft.get_model_arch_config()
        draft._model_info, draft._architecture = draft.registry.inspect_model_cls(draft.architectures, draft)
    get_model_architecture(model_config)  # imports the class before tensors go to the meta device
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16), torch.device("meta"):
        config.compilation_config.static_forward_context.clear()
        model = initialize_model(config, model_config=model_config, prefix="draft" if case.get("draft") else "")
    return {n: [p.numel() * p.element_size(), str(p.dtype)] for n, p in model.named_parameters()}


out = []
for case in json.load(sys.stdin):
    with tempfile.TemporaryDirectory() as folder:
        try:
            out.append(build(case, Path(folder)))
        except Exception as error:
            if os.environ.get("TRACE"):
                raise
            out.append({"error": f"{type(error).__name__}: {error}"[:600]})
print("SIZES " + json.dumps(out))
