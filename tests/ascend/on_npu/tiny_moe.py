"""Tiny mixtures of experts of two families, random, with a tokenizer."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

# Every token goes to every expert: a router that chooses flips between experts that are as good when bfloat16 rounds.
SIZES = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 5,
    "max_position_embeddings": 64,
}  # fmt: skip


def make(name: str, folder: Path) -> None:
    """A random model with a tokenizer of bytes; weights large enough that a wrong layer shows in the logits."""
    torch.manual_seed(0)
    if name == "qwen3-moe":
        config = transformers.Qwen3MoeConfig(num_experts=5, decoder_sparse_step=1, mlp_only_layers=[1], **SIZES)
        model = transformers.Qwen3MoeForCausalLM(config)
    else:
        config = transformers.Glm4MoeConfig(
            n_routed_experts=5, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1, **SIZES
        )
        model = transformers.Glm4MoeForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.15)
    model.save_pretrained(folder)
    bytes_only = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}, merges=[]))
    bytes_only.pre_tokenizer, bytes_only.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=bytes_only).save_pretrained(folder)
