"""The graph of a decoder: embedding, layers of grouped-query attention and gated MLP, norm, head.

Operators of onnxruntime (com.microsoft, `docs/ContribOperators.md` of 1.31): MatMulNBits, GroupQueryAttention with its
own rotary embedding and cache, GatherBlockQuantized. Activations are float32; accuracy level 4 lets MatMulNBits
multiply with int8 activations per block.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from transload.decoder.graph import CONTRIB, GraphBuilder, Values
from transload.decoder.shape import DecoderShape
from transload.decoder.weights import Weights
from transload.errors import Unsupported
from transload.quant import PER_CHANNEL, Zero

FLOAT, INT32, INT64 = 1, 6, 7  # TensorProto.DataType
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
INT8_ACTIVATIONS = 4  # MatMulNBits accuracy_level
QDQ_TYPES = {(4, True): 22, (4, False): 21, (8, True): 3, (8, False): 2}  # by bits and sign: INT4, UINT4, INT8, UINT8


def decoder_graph(shape: DecoderShape, weights: Weights, data_file: str) -> bytes:
    """The model.onnx of a decoder whose weights lie in `data_file`.

    Raises Unsupported when a weight is missing or has no place.
    """
    build = _Decoder(shape, weights, data_file)
    out = build.whole()
    unused = sorted(weights.tensors.keys() - build.used)
    if unused:
        raise Unsupported(
            f"the ONNX graph of '{shape.model_type}' has no place for {len(unused)} tensors: {', '.join(unused[:3])}"
        )
    return out


class _Decoder:
    def __init__(self, shape: DecoderShape, weights: Weights, data_file: str) -> None:
        self.shape, self.weights, self.graph = shape, weights, GraphBuilder(data_file)
        self.used: set[str] = set()

    def whole(self) -> bytes:
        s, g = self.shape, self.graph
        cache: list[object] = ["batch_size", s.kv_heads, "past_sequence_length", s.head_dim]
        longer: list[object] = ["batch_size", s.kv_heads, "total_sequence_length", s.head_dim]
        inputs: Values = {
            "input_ids": (INT64, ["batch_size", "sequence_length"]),
            "attention_mask": (INT64, ["batch_size", "total_sequence_length"]),
        }
        outputs: Values = {"logits": (FLOAT, ["batch_size", "sequence_length", s.vocabulary])}
        for i in range(s.layers):
            inputs |= {f"past_key_values.{i}.{part}": (FLOAT, cache) for part in ("key", "value")}
            outputs |= {f"present.{i}.{part}": (FLOAT, longer) for part in ("key", "value")}
        self._lengths()
        self._tables()
        x = self._embedding("input_ids")
        for i in range(s.layers):
            x = self._layer(i, x)
        x = self._norm(x, "model.norm")
        self._head(x)
        return g.model(inputs, outputs, f"{s.model_type} written by transload")

    def _lengths(self) -> None:
        """seqlens_k int32 [B]: tokens of each row without the last; total int32: the longest row."""
        g = self.graph
        summed = g.node("ReduceSum", ["attention_mask", g.constant([1], "axis")], "attention_mask/sum", keepdims=0)
        less = g.node("Sub", [summed, g.constant([1], "one")], "attention_mask/last")
        g.node("Cast", [less], "attention_mask/seqlens", ["seqlens_k"], to=INT32)
        length = g.node("Shape", ["attention_mask"], "attention_mask/shape", start=1, end=2)
        g.node("Cast", [g.node("Squeeze", [length], "attention_mask/total")], "attention_mask/int", ["total"], to=INT32)

    def _tables(self) -> None:
        angles = torch.arange(self.shape.context).float()[:, None] * self.shape.inv_freq[None, :]
        self.graph.table("cos_cache", angles.cos() * self.shape.rope_scale)
        self.graph.table("sin_cache", angles.sin() * self.shape.rope_scale)

    def _layer(self, i: int, x: str) -> str:
        at, family = f"model.layers.{i}", self.shape.family
        y = self._attention(i, self._norm(x, f"{at}.input_layernorm"))
        if family.sandwich:
            y = self._norm(y, f"{at}.post_self_attn_layernorm")
        x = self.graph.node("Add", [x, y], f"{at}/residual")
        y = self._mlp(f"{at}.mlp", self._norm(x, f"{at}.post_attention_layernorm"))
        if family.sandwich:
            y = self._norm(y, f"{at}.post_mlp_layernorm")
        return self.graph.node("Add", [x, y], f"{at}/out")

    def _attention(self, i: int, x: str) -> str:
        s, at = self.shape, f"model.layers.{i}.self_attn"
        q, k, v = (self._linear(f"{at}.{part}_proj", x) for part in "qkv")
        if s.family.head_norms:
            q, k = self._head_norm(q, f"{at}.q_norm", s.heads), self._head_norm(k, f"{at}.k_norm", s.kv_heads)
        past = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        outputs = [f"{at}/attended", f"present.{i}.key", f"present.{i}.value"]
        y = self.graph.node(
            "GroupQueryAttention",
            [q, k, v, *past, "seqlens_k", "total", "cos_cache", "sin_cache"],
            f"{at}/GroupQueryAttention",
            outputs,
            CONTRIB,
            num_heads=s.heads,
            kv_num_heads=s.kv_heads,
            scale=s.head_dim**-0.5,
            do_rotary=1,
            rotary_interleaved=int(s.family.interleaved_rope),
        )
        return self._linear(f"{at}.o_proj", y)

    def _head_norm(self, x: str, name: str, heads: int) -> str:
        g = self.graph
        split = g.node("Reshape", [x, g.constant([0, 0, heads, self.shape.head_dim], f"{name}/heads")], f"{name}/split")
        joined = g.constant([0, 0, heads * self.shape.head_dim], f"{name}/whole")
        return g.node("Reshape", [self._norm(split, name), joined], f"{name}/join")

    def _mlp(self, at: str, x: str) -> str:
        g = self.graph
        if self.shape.family.fused_gate_up:
            both = self._linear(f"{at}.gate_up_proj", x)
            gate, up = f"{at}/gate", f"{at}/up"
            g.node("Split", [both], f"{at}/split", [gate, up], axis=-1, num_outputs=2)
        else:
            gate, up = self._linear(f"{at}.gate_proj", x), self._linear(f"{at}.up_proj", x)
        silu = g.node("QuickGelu", [gate], f"{at}/silu", domain=CONTRIB, alpha=1.0)
        return self._linear(f"{at}.down_proj", g.node("Mul", [silu, up], f"{at}/gated"))

    def _embedding(self, ids: str) -> str:
        g, w = self.graph, self.weights
        spec = w.specs.get(EMBEDDING)
        if spec is None:
            return g.node("Gather", [self._weight(f"{EMBEDDING}.weight"), ids], EMBEDDING)
        n, k = w.shapes[EMBEDDING]
        codes = self._weight(f"{EMBEDDING}.B", (n, k * spec.bits // 8))
        zeros = self._weight(f"{EMBEDDING}.zero_points") if spec.zero is Zero.CODES else ""
        inputs = [codes, ids, self._weight(f"{EMBEDDING}.scales"), zeros]
        return g.node(
            "GatherBlockQuantized",
            inputs,
            EMBEDDING,
            domain=CONTRIB,
            bits=spec.bits,
            block_size=spec.group_size,
            gather_axis=0,
            quantize_axis=1,
        )

    def _head(self, x: str) -> None:
        """The head's own weight, else the embedding's: the same bytes under a second name and shape."""
        if self.weights.has(HEAD):
            self._linear(HEAD, x, output="logits")
        elif EMBEDDING in self.weights.specs:
            self._nbits(HEAD, EMBEDDING, x, "logits")
        else:
            table = f"{EMBEDDING}.weight"
            self.graph.node("FusedMatMul", [x, table], HEAD, ["logits"], CONTRIB, transB=1)

    def _linear(self, module: str, x: str, output: str = "") -> str:
        output = output or f"{module}/out"
        if module in self.weights.specs:
            return (self._qdq if self.weights.qdq else self._nbits)(module, module, x, output)
        weight = self._weight(f"{module}.weight")
        bias = f"{module}.bias"
        product = f"{module}/product" if bias in self.weights.tensors else output
        self.graph.node("FusedMatMul", [x, weight], module, [product], CONTRIB, transB=1)
        if product != output:
            self.graph.node("Add", [product, self._weight(bias)], f"{module}/bias", [output])
        return output

    def _nbits(self, module: str, weight: str, x: str, output: str) -> str:
        w = self.weights
        spec, (n, k) = w.specs[weight], w.shapes[weight]
        parts = [
            "" if f"{weight}.{p}" not in w.tensors else f"{weight}.{p}" for p in ("scales", "zero_points", "g_idx")
        ]
        codes = self._codes(module, weight)
        bias = f"{module}.bias" if f"{module}.bias" in w.tensors else ""
        inputs = [x, codes, *(self._weight(p) if p else "" for p in parts), self._weight(bias) if bias else ""]
        return self.graph.node(
            "MatMulNBits",
            inputs,
            module,
            [output],
            CONTRIB,
            N=n,
            K=k,
            bits=spec.bits,
            block_size=spec.group_size,
            accuracy_level=0 if spec.act is None else INT8_ACTIVATIONS,
        )

    def _qdq(self, module: str, weight: str, x: str, output: str) -> str:
        """DequantizeLinear over [K, N], then a product called like the module."""
        spec, (n, k), g = self.weights.specs[weight], self.weights.shapes[weight], self.graph
        signed, per_channel = spec.zero is Zero.MIDPOINT, spec.group_size == PER_CHANNEL
        kind = QDQ_TYPES[spec.bits, signed]
        side = (n,) if per_channel else (spec.groups(k), n)
        codes = self._weight(f"{weight}.codes", (k, n), kind)
        zeros = "" if signed else self._weight(f"{weight}.zeros", side, kind)
        blocks = {"axis": 1} if per_channel else {"axis": 0, "block_size": spec.group_size}
        inputs = [codes, self._weight(f"{weight}.scales"), zeros]
        dequantized = g.node("DequantizeLinear", inputs, f"{module}/DequantizeLinear", (), "", **blocks)
        bias = f"{module}.bias"
        product = f"{module}/product" if bias in self.weights.tensors else output
        g.node("MatMul", [x, dequantized], module, [product])
        if product != output:
            g.node("Add", [product, self._weight(bias)], f"{module}/bias", [output])
        return output

    def _codes(self, module: str, weight: str) -> str:
        """The codes of a linear; of a head that shares the embedding's, the same bytes as [N, blocks, bytes]."""
        stored = self.weights.need(f"{weight}.B")
        if module == weight:
            return self._weight(f"{weight}.B")
        return self.graph.weight(f"{module}.B", stored)

    def _norm(self, x: str, name: str) -> str:
        weight = self._weight(f"{name}.weight")
        node = f"{name}/norm"
        return self.graph.node(
            "SimplifiedLayerNormalization", [x, weight], node, axis=-1, epsilon=self.shape.eps, stash_type=1
        )

    def _weight(self, name: str, shape: tuple[int, ...] | None = None, data_type: int | None = None) -> str:
        self.used.add(name)
        at = self.weights.need(name)
        return self.graph.weight(name, at if data_type is None else replace(at, data_type=data_type), shape)
