"""Heads that stayed in float: the checkpoint's own width, the same numbers, one token through the kernel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from test_decoding import FOUR, LLAMA, TOKENS, decode, distance, is_native
from torch import Tensor, nn
from transformers import PreTrainedModel

import transload
from transload.errors import ConfigError
from transload.hal import Kernel
from transload.runtime import TransloadConfig, report
from transload.runtime.decoding.head import FloatHead, NarrowEmbedding
from transload_cpu import native_library
from transload_cpu.native_kernel import NATIVE_KERNELS, NativePortable

pytestmark = pytest.mark.skipif(
    native_library.unavailable() is not None, reason=str(native_library.unavailable() or "")
)
KERNELS = [k for k in (*NATIVE_KERNELS, NativePortable()) if native_library.supported(k.isa)]
WIDTHS = [torch.bfloat16, torch.float16]


def tiny(folder: Path, stored: torch.dtype, tied: bool, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A Llama whose checkpoint is of `stored`, rounded to 4 bits but for its embedding and head."""
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **FOUR, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.to(stored).save_pretrained(folder)
    return transload.load(folder, quantize=TransloadConfig(group_size=32, device="cpu"), dtype=dtype)


def widened(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with torch's own head and embedding, in float32."""
    other = copy.deepcopy(model)
    head, embedding = other.lm_head, other.get_input_embeddings()
    plain = nn.Linear(head.in_features, head.out_features, bias=False)
    plain.weight = nn.Parameter(head.weight.float())
    other.lm_head = plain
    if isinstance(embedding, NarrowEmbedding):
        other.set_input_embeddings(nn.Embedding(*plain.weight.shape))
        other.get_input_embeddings().weight = plain.weight
    return other


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("stored", WIDTHS, ids=str)
def test_a_head_keeps_the_width_of_its_checkpoint_and_its_numbers(
    stored: torch.dtype, tied: bool, tmp_path: Path
) -> None:
    model = tiny(tmp_path, stored, tied)
    head = model.lm_head
    assert isinstance(head, FloatHead)
    assert head.weight.dtype == stored
    assert model.dtype == torch.float32  # of activations and caches
    assert is_native(model)
    plain = widened(model)
    with torch.inference_mode():
        for tokens in (TOKENS, TOKENS[:, :7]):  # more than the kernel takes, and few
            assert distance(model(tokens).logits, plain(tokens).logits) < 1e-6
    assert distance(decode(model, TOKENS, 5), decode(plain, TOKENS, 5)) < 1e-6
    assert report(plain).float_bytes - report(model).float_bytes == head.weight.nbytes
    settings = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None, "do_sample": False}
    for more in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
        ours = model.generate(TOKENS[:, :6], **settings, **more)
        assert torch.equal(ours, plain.generate(TOKENS[:, :6], **settings, **more)), more


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_numbers_that_need_32_bits_keep_them(tied: bool, tmp_path: Path) -> None:
    model = tiny(tmp_path, torch.float32, tied)
    head = model.lm_head
    assert isinstance(head, FloatHead)
    assert isinstance(head.weight, nn.Parameter)
    assert (model.get_input_embeddings().weight is head.weight) == tied
    assert distance(decode(model, TOKENS, 5), decode(widened(model), TOKENS, 5)) < 1e-6


def test_bfloat16_activations_round_once(tmp_path: Path) -> None:
    model = tiny(tmp_path, torch.bfloat16, False, torch.bfloat16)
    assert isinstance(model.lm_head, FloatHead)
    x = torch.randn(1, 1, 64).bfloat16()
    with torch.no_grad():
        want = (x.double() @ model.lm_head.weight.double().T).to(torch.bfloat16)
        got = model.lm_head(x)
    assert got.dtype == torch.bfloat16
    assert (got == want).float().mean() > 0.95  # one rounding, of a sum in float32


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_saved_model_comes_back_with_the_same_numbers(tied: bool, tmp_path: Path) -> None:
    model = tiny(tmp_path / "float", torch.float16, tied)
    model.save_pretrained(tmp_path / "saved")
    again = transload.load(tmp_path / "saved", device="cpu")
    assert again.lm_head.weight.dtype == torch.float16
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert torch.equal(decode(again, TOKENS, 5), decode(model, TOKENS, 5))
    model.tie_weights()  # there is nothing left to tie
    assert torch.equal(decode(again, TOKENS, 5), decode(model, TOKENS, 5))


def test_what_a_user_does_with_a_model_goes_on_working(tmp_path: Path) -> None:
    model = tiny(tmp_path, torch.float16, True)
    first, weight = decode(model, TOKENS, 5), model.lm_head.weight
    assert torch.equal(decode(copy.deepcopy(model), TOKENS, 5), first)
    embeds = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    model(inputs_embeds=embeds).logits.square().sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0
    one = torch.randn(1, 64, requires_grad=True)
    model.lm_head(one).sum().backward()
    assert torch.allclose(one.grad, weight.float().sum(0, keepdim=True), atol=1e-4)
    half = model.to(torch.bfloat16)  # activations; the numbers stay
    assert torch.equal(half.lm_head.weight, weight)
    assert half.get_input_embeddings()(TOKENS).dtype == torch.bfloat16
    assert distance(decode(half, TOKENS, 5).float(), first) < 5e-2


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("dtype", [torch.float32, *WIDTHS], ids=str)
def test_float_products_on_every_instruction_set(kernel: Kernel, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    for n, k in ((1, 1), (7, 5), (33, 64), (1000, 333), (3, 100_000)):
        w, x = torch.randn(n, k).to(dtype), torch.randn(3, k)
        want = x.double() @ w.double().T
        scale = x.double().norm(dim=1, keepdim=True) * w.double().norm(dim=1)
        one = kernel.float_product(x, w)
        assert ((one - want).abs() / scale).max() < 1e-6
        assert torch.equal(kernel.float_product(x[1:2], w), one[1:2])
        try:
            torch.set_num_threads(3)
            assert torch.equal(kernel.float_product(x, w), one)
        finally:
            torch.set_num_threads(before)


def test_small_and_odd_numbers_of_float16() -> None:
    numbers = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).reshape(-1, 1)
    for kernel in KERNELS:
        got, want = kernel.float_product(torch.ones(1, 1), numbers)[0], numbers[:, 0].float()
        assert torch.equal(got.isnan(), want.isnan())
        assert torch.equal(got.nan_to_num(), want.nan_to_num())
        rows = want.clamp(-1, 1).nan_to_num()
        many = rows.to(torch.float16).unsqueeze(1).expand(-1, 64).contiguous()
        assert torch.equal(kernel.float_product(torch.eye(64)[:2], many), rows.expand(2, -1))


def test_a_compiled_head_computes_the_same(tmp_path: Path) -> None:
    head = tiny(tmp_path, torch.float16, False).lm_head
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (1, 5, 40):
            x = torch.randn(rows, 64)
            assert distance(compiled(x), head(x)) < 1e-6


def test_wrong_products_are_refused() -> None:
    kernel, x, w = KERNELS[0], torch.ones(3, 8), torch.ones(4, 8)
    cases: tuple[tuple[Tensor, Tensor], ...] = (
        (x[:, 1:], w), (x.double(), w), (x, w.double()), (x, w.T), (x, w[:, ::2]), (x[0], w), (x, w[None]),
    )  # fmt: skip
    for bad in cases:
        with pytest.raises(ConfigError, match="native product: "):
            kernel.float_product(*bad)


def test_modules_that_are_not_plain_heads_stay(tmp_path: Path) -> None:
    torch.manual_seed(3)
    config: Any = transformers.LlamaConfig(**LLAMA, **FOUR)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    recipe = TransloadConfig(group_size=32, device="cpu", quantize_head=True)
    assert type(transload.load(tmp_path, quantize=recipe).lm_head).__name__ == "QuantLinear"
    assert (
        type(transload.load(tmp_path, device="cpu").lm_head) is nn.Linear
    )  # nothing is quantized: all is transformers'
