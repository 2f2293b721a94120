"""What an engine refuses, checked before launch: heads, experts, vocabularies and quantization groups under a shape.

Each rule gives a Violation: what does not divide, in numbers, and the ways out. Rules and their sources are in the
functions' docstrings; engine is vLLM 0.32 unless another is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transload.models.info import Attention
from transload.plan.catalogue import DeviceType
from transload.plan.engines import Engine
from transload.plan.ledger import padded_vocabulary, piece, shared_whole, ways_of
from transload.plan.model import Model, Weight
from transload.plan.modules import Cut, Module, Part
from transload.plan.schemes import Kind, Scheme
from transload.plan.shapes import Shape


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a shape breaks. ways_out are phrases that complete "try ..."."""

    rule: str
    text: str
    ways_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text + (f" (try {', or '.join(self.ways_out)})" if self.ways_out else "")


def violations(model: Model, shape: Shape, engine: Engine) -> list[Violation]:
    """Every rule that the shape breaks on this engine; empty when the engine would start it."""
    found = [*_heads(model, shape), *_experts(model, shape), *_vocabulary(model, shape), *_pipeline(model, shape)]
    found += [*_loadable(model, engine), *_ascend(model, shape, engine), *_vision(model, shape)]
    if not found:
        found += _groups(model, shape, engine)
    return found


def _heads(model: Model, shape: Shape) -> Iterator[Violation]:
    """Heads a rank: config/model.py (attention), linear.py QKVParallelLinear (key-value), qwen_gdn_linear_attn.py."""
    info, t = model.info, shape.tp
    if info.heads % t:
        yield Violation("heads", f"{info.heads} attention heads do not divide by TP {t}", (_divisors(info.heads, t),))
    kinds = set(info.attention)
    if kinds & {Attention.FULL, Attention.SLIDING} and (info.kv_heads % t if info.kv_heads >= t else t % info.kv_heads):
        text = f"{info.kv_heads} key-value heads neither divide by TP {t} nor divide it"
        yield Violation("kv heads", text, (_divisors(info.kv_heads, t),))
    if info.linear is not None:
        for word, heads in (("key", info.linear.key_heads), ("value", info.linear.value_heads)):
            if heads % t:
                yield Violation("linear heads", f"{heads} linear-attention {word} heads do not divide by TP {t}")
    if shape.dcp > 1 and kinds == {Attention.MLA} and t % shape.dcp:
        yield Violation("dcp", f"DCP {shape.dcp} does not divide TP {t}")
    if shape.dcp > 1 and kinds != {Attention.MLA}:
        yield Violation("dcp", "DCP is planned for MLA models only", ("DCP 1",))


def _experts(model: Model, shape: Shape) -> Iterator[Violation]:
    """fused_moe/config.py: the width of an expert divides by TP x DP without EP; EP and DP are for mixtures only."""
    experts = model.info.experts
    if experts is None:
        if shape.ep:
            yield Violation("ep", "expert parallelism needs a mixture of experts, this model is dense", ("no EP",))
        if shape.dp > 1:
            text = (
                "data parallelism inside one instance is for mixtures of experts; a dense model runs separate replicas"
            )
            yield Violation("dp", text, ("DP 1 and more replicas",))
        return
    ranks = shape.expert_ranks
    if not shape.ep and experts.intermediate % ranks:
        text = f"expert width {experts.intermediate} does not divide by TP x DP = {ranks}"
        yield Violation("expert width", text, ("EP, which keeps experts whole",))
    if shape.ep and ranks == 1:
        yield Violation("ep", "expert parallelism needs TP x DP > 1", ("no EP",))
    if shape.ep and ranks > experts.count:
        yield Violation("ep", f"{experts.count} experts cannot be spread over {ranks} ranks")
    if experts.shared and experts.shared % shape.tp:
        yield Violation("shared experts", f"shared experts of width {experts.shared} do not divide by TP {shape.tp}")
    if not all(model.info.sparse) and model.info.intermediate % shape.tp:
        yield _mlp(model, shape)


def _mlp(model: Model, shape: Shape) -> Violation:
    return Violation("mlp width", f"MLP width {model.info.intermediate} does not divide by TP {shape.tp}")


def _vocabulary(model: Model, shape: Shape) -> Iterator[Violation]:
    """vocab_parallel_embedding.py: the vocabulary padded to 64 divides by TP. Dense MLPs divide too (linear.py)."""
    rows = padded_vocabulary(model.info.vocab)
    if rows % shape.tp:
        yield Violation(
            "vocabulary", f"vocabulary {model.info.vocab}, padded to {rows}, does not divide by TP {shape.tp}"
        )
    if model.info.experts is None and model.info.intermediate % shape.tp:
        yield _mlp(model, shape)


def _pipeline(model: Model, shape: Shape) -> Iterator[Violation]:
    """distributed/utils.get_pp_indices: every stage has a layer."""
    if shape.pp > model.info.layers:
        yield Violation("layers", f"{model.info.layers} layers cannot fill {shape.pp} pipeline stages")


def _vision(model: Model, shape: Shape) -> Iterator[Violation]:
    """The vision tower is cut by heads like the rest (--mm-encoder-tp-mode data keeps it whole)."""
    v = model.info.vision
    if v is not None and (v.heads % shape.tp or v.intermediate % shape.tp):
        text = f"vision tower ({v.heads} heads, width {v.intermediate}) does not divide by TP {shape.tp}"
        yield Violation("vision", text, ("--mm-encoder-tp-mode data", "--language-model-only"))


def _loadable(model: Model, engine: Engine) -> Iterator[Violation]:
    """Schemes that the engine has no kernel for."""
    if engine.platform == "cuda" and any(s.kind is Kind.INT_ACT and s.bits == 4 for s in model.schemes()):
        text = f"{engine.name} on CUDA has no int4 weights with int8 activations"
        yield Violation("format", text, ("recipe int4-g128 (W4A16)", "recipe w8a8"))
    if engine.platform != "ascend" and any(s.act_order and s.grouped for s in model.schemes()):
        # vLLM 0.32: gptq_utils.py and compressed_tensors.py refuse desc_act and actorder "group" when they start.
        text = f"{engine.name} {engine.version} no longer loads groups in activation order (desc_act, actorder=group)"
        yield Violation("format", text, ("requantizing: transload port --requantize int4-g128",))
    own = next((s for s in model.schemes() if s.kind is Kind.BLOCKS), None)
    if own is not None:
        text = f"{engine.name} {engine.version} does not load {own.name} (GGUF and bitsandbytes)"
        yield Violation("format", text, ("porting it: transload port, or recipe int4-g32",))
        return
    if engine.platform != "ascend":
        return
    for weight in model.weights():
        scheme, part = weight.scheme, weight.module.part
        if scheme.kind is Kind.INT and part is not Part.EXPERTS:
            text = f"{engine.name} has no weight-only integer linear ({scheme.name}, {weight.module.name})"
            yield Violation("format", text, ("recipe w4a8 (mixtures)", "recipe w8a8"))
            return
        if scheme.kind in (Kind.FP8, Kind.FP4):
            yield Violation(
                "format", f"{engine.name} does not load {scheme.name} on this hardware", ("recipe w4a8 or w8a8",)
            )
            return
        if scheme.kind is Kind.INT_ACT and scheme.bits == 4:
            reason = engine.group_experts if part is Part.EXPERTS and scheme.grouped else None
            reason = reason or (engine.dense_four_bits if part is not Part.EXPERTS else None)
            if reason:
                yield Violation(
                    "format", f"{reason} ({weight.module.name}: {scheme.name})", ("recipe w4a8", "recipe w8a8")
                )
                return


def device_violation(model: Model, device: DeviceType) -> Violation | None:
    """Schemes that a device has no instructions for, whatever the engine.

    Marlin's 4-bit kernels start at compute capability 7.5 (marlin.get_min_capability); 310P has int8 products only
    (torch_npu, npu_weight_quant_batchmatmul: int32-packed int4 on A2 and A3).
    """
    four = any(s.kind in (Kind.INT, Kind.INT_ACT) and s.bits <= 4 for s in model.schemes())
    if four and device.arch == "sm70":
        return Violation("device", f"{device.name}: 4-bit kernels need compute capability 7.5", ("recipe bf16",))
    if four and device.arch == "ascend310p":
        return Violation("device", f"{device.name} has no 4-bit matrix products", ("recipe w8a8",))
    return None


def _ascend(model: Model, shape: Shape, engine: Engine) -> Iterator[Violation]:
    """vllm-ascend quantization/methods/w4a8.py: scale_bias has 16 / TP columns, so TP divides 16 without EP."""
    four = any(s.kind is Kind.INT_ACT and s.bits == 4 for s in model.schemes())
    if engine.platform == "ascend" and four and not shape.ep and 16 % shape.tp:
        yield Violation(
            "scale_bias", f"W4A8 experts keep 16 partial sums, which do not divide by TP {shape.tp}", ("EP",)
        )


def _groups(model: Model, shape: Shape, engine: Engine) -> Iterator[Violation]:
    """Quantization groups and blocks that a cut would tear, one Violation a distinct module."""
    seen: set[tuple[str, Part]] = set()
    for weight in (*model.weights(), *((model.head,) if model.head.scheme.grouped else ())):
        found = group_violation(model, weight, shape, engine)
        if found is not None and (found.text, weight.module.part) not in seen:
            seen.add((found.text, weight.module.part))
            yield found


def group_violation(model: Model, weight: Weight, shape: Shape, engine: Engine) -> Violation | None:
    """Why the pieces of one weight do not hold whole groups, or None.

    Row-parallel: distributed/utils.verify_group_size_divides_partition and marlin.can_implement. A group that
    straddles ranks cannot be padded. FP8 blocks cut rows as well (fp8 utils, validate_fp8_block_shape).
    """
    module, scheme = weight.module, weight.scheme
    if not scheme.grouped or scheme.kind is Kind.BLOCKS:
        return None
    ways = ways_of(module, shape, shared_whole(model, engine.platform))
    n, k = piece(module, ways)
    step = _step(scheme, module, engine)
    where = f"{module.name.replace('.{e}', '')} K={module.k}"
    if module.cut is Cut.COLUMNS and (module.k % ways or k % step):
        share = f"{module.k}/{ways} = {module.k / ways:g}"
        cut = f"{share} inputs a rank are {module.k / ways / step:g} groups of {step}"
        text = f"{where}: {cut}, not whole groups" if ways > 1 else f"{where}: {module.k / step:g} groups of {step}"
        return Violation("quantization groups", text, _group_ways_out(weight, shape, ways))
    if module.k % step:
        return Violation("quantization groups", f"{where} is {module.k / step:g} groups of {step}", ("16-bit for it",))
    if scheme.rows > 1 and module.cut in (Cut.ROWS, Cut.KV_ROWS) and ways > 1 and n % scheme.rows:
        text = f"{module.name} N={module.n}: {n} rows a rank are not whole blocks of {scheme.rows}"
        return Violation("quantization blocks", text, ("EP",) if module.part is Part.EXPERTS else ("a smaller TP",))
    return None


def _step(scheme: Scheme, module: Module, engine: Engine) -> int:
    """Inputs that a piece must hold a multiple of."""
    if scheme.kind is Kind.INT and module.part is not Part.EXPERTS and engine.platform == "cpu":
        return max(scheme.group, 32)
    return scheme.group


def _group_ways_out(weight: Weight, shape: Shape, ways: int) -> tuple[str, ...]:
    """Group sizes that fit this cut, EP for experts, 16 bits, other TP sizes: those that really work."""
    module, out = weight.module, list[str]()
    if module.part is Part.EXPERTS and not shape.ep and module.k % weight.scheme.group == 0:
        out.append("EP, which keeps experts whole")
    sizes = [g for g in (64, 32) if g < weight.scheme.group and module.k % (ways * g) == 0]
    out += [f"requantizing with group size {' or '.join(str(g) for g in sizes)}"] if sizes else []
    if module.part is not Part.EXPERTS:
        out.append(f"leaving {module.part.value} in 16 bits")
    tps = [t for t in (8, 4, 2, 1) if t < shape.tp and module.k % (t * weight.scheme.group) == 0]
    out += [f"TP {tps[0]} with more pipeline stages"] if tps and module.part is not Part.EXPERTS else []
    return tuple(out)


def _divisors(heads: int, near: int) -> str:
    sizes = [t for t in range(1, heads + 1) if heads % t == 0]
    below = max((t for t in sizes if t < near), default=1)
    above = min((t for t in sizes if t > near), default=heads)
    return f"TP {below} or {above}" if above != below else f"TP {below}"
