"""What engines load: for one quantized layer in one format, whether an engine runs it, and in which precision.

Data, one row a rule, read from the engines' own sources and checked by running them where that is possible here
(docs/engines.md). Transload's own runtime is not in this list: its kernels answer for themselves (`hal.choose`).
"""

from __future__ import annotations

from transload.engine import Engine, Layer, Rule
from transload.errors import ConfigError
from transload.quant import PER_CHANNEL, Grid, Zero

ANY: frozenset[int] = frozenset()
_SYM, _ASYM = frozenset({Zero.MIDPOINT}), frozenset({Zero.CODES})
_NONE = frozenset({Zero.NONE})
_W4, _W8, _W48 = frozenset({4}), frozenset({8}), frozenset({4, 8})
_CHANNEL = frozenset({PER_CHANNEL})
_SERVE = "vllm serve {path}"

_MARLIN = frozenset({PER_CHANNEL, 32, 64, 128})
_MACHETE = frozenset({PER_CHANNEL, 64, 128})
_HOPPER = frozenset({"sm90"})
_BEFORE_ADA = frozenset({"sm75", "sm80", "sm86"})
_FROM_ADA = frozenset({"sm89", "sm90", "sm100", "sm120"})
_INT8_CORES = frozenset({"sm75", "sm80", "sm86", "sm89", "sm90"})

# What the environment variable does and where it misleads, by the kernel that is chosen.
_MARLIN_A8 = (
    "VLLM_MARLIN_INPUT_DTYPE=int8 makes Marlin multiply int8 activations, and rounds the scales of symmetric 4-bit "
    "layers a second time"
)
_TRAP = (
    "VLLM_MARLIN_INPUT_DTYPE=int8 is a trap on sm90: Machete is chosen and goes on with 16-bit activations; only with "
    "VLLM_DISABLED_KERNELS=MacheteLinearKernel does it reach Marlin"
)
_IGNORED = "VLLM_MARLIN_INPUT_DTYPE changes nothing on sm90: Machete is chosen, which has 16-bit activations"
_INT8_ARCHS = "from sm100 on vLLM refuses int8 matmuls when the first token is computed"

VLLM_CUDA = Engine(
    "vllm",
    "0.32",
    "CUDA",
    (
        Rule("gptq", _W48, _MACHETE, _SYM, "W{bits}A16", "Machete", experts=False, archs=_HOPPER, note=_TRAP),
        Rule("gptq", _W48, _MARLIN, _SYM, "W{bits}A16", "Marlin", note=_MARLIN_A8),
        Rule("awq", _W4, _MACHETE, _ASYM, "W4A16", "Machete", experts=False, archs=_HOPPER, note=_TRAP),
        Rule("awq", _W4, _MARLIN, _ASYM, "W4A16", "Marlin"),
        Rule("compressed-tensors", _W48, _MACHETE, _SYM, "W{bits}A16", "Machete", experts=False, archs=_HOPPER,
             note=_IGNORED),
        Rule("compressed-tensors", _W48, _MACHETE, _ASYM, "W{bits}A16", "Machete", experts=False, archs=_HOPPER),
        Rule("compressed-tensors", _W48, _MARLIN, _SYM, "W{bits}A16", "Marlin", note=_MARLIN_A8),
        Rule("compressed-tensors", _W4, _MARLIN, _ASYM, "W4A16", "Marlin"),
        Rule("compressed-tensors", _W4, frozenset({256}), _SYM | _ASYM, "W4A16", "Triton", experts=False),
        Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", "CUTLASS", act="token", archs=_INT8_CORES,
             note=_INT8_ARCHS),
        Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", "CUTLASS", act="static", archs=_INT8_CORES,
             note=_INT8_ARCHS),
        Rule("fp8", _W8, frozenset({128}), _NONE, "W8A8 fp8", grid=Grid.E4M3, archs=_FROM_ADA),
        Rule("fp8", _W8, frozenset({128}), _NONE, "W8A16", "Marlin", grid=Grid.E4M3, archs=_BEFORE_ADA),
    ),
    _SERVE,
    ("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120"),
)  # fmt: skip

_AMX, _AVX512 = frozenset({"amx"}), frozenset({"avx512"})
_SILENT = "with AMX and bfloat16 it runs as W4A8 unless VLLM_CPU_INT4_W4A8=0; without AMX as W4A16"
_WIDE = "CPUWNA16"
_CPU_STATIC = "with AMX static activation scales are ignored: a scale is found for every token"
_CPU_EXPERTS = "experts of 4 and 8 bits need AMX; inside, 4-bit ones multiply int8 activations"


def _cpu_int4(format: str, zeros: frozenset[Zero]) -> tuple[Rule, Rule]:
    """Dense 4-bit layers: the same kernel, with int8 activations where there is AMX."""
    return (
        Rule(format, _W4, _MARLIN, zeros, "W4A8", _WIDE, experts=False, archs=_AMX, multiple=32, note=_SILENT),
        Rule(format, _W4, _MARLIN, zeros, "W4A16", _WIDE, experts=False, archs=_AVX512, multiple=32, note=_SILENT),
    )


VLLM_CPU = Engine(
    "vllm-cpu",
    "0.32",
    "CPU",
    (
        *_cpu_int4("gptq", _SYM),
        *_cpu_int4("awq", _ASYM),
        *_cpu_int4("compressed-tensors", _SYM | _ASYM),
        Rule("compressed-tensors", _W4, frozenset({PER_CHANNEL, 64, 128}), _SYM, "W4A8", "CPUExpertsInt4",
             experts=True, archs=_AMX, note=_CPU_EXPERTS),
        Rule("compressed-tensors", _W4, _MARLIN, _SYM, "W4A8", "Dynamic4bit", act="token", experts=False),
        Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", "CPUInt8ScaledMM", act="token", experts=False),
        Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", "CPUInt8ScaledMM", act="static", experts=False,
             note=_CPU_STATIC),
        Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", "CPUExpertsInt8", act="token", experts=True,
             archs=_AMX, multiple=32, note=_CPU_EXPERTS),
    ),
    _SERVE,
    ("amx", "avx512"),
)  # fmt: skip

_A23 = frozenset({"a2", "a3"})
_EXPERT_NOTE = "experts in compressed-tensors W4A16 have no expert load balancing (EPLB) in vllm-ascend"
_BF16_SCALES = "vllm-ascend loads these scales as bfloat16, so that float32 ones are rounded once"
_WEIGHT_QUANT, _QUANT = "npu_weight_quant_batchmatmul", "npu_quant_matmul"
_GROUPED = "npu_grouped_matmul"
_ASCEND_SERVE = "vllm serve {path} --quantization ascend"
# Attention, shared experts and dense layers are few weights and run often; routed experts are nearly all weights.
_ASCEND_MIXED = ("experts=int4-channel-a8", "int8-channel-a8")

_ASCEND_BOTH = (
    Rule("msmodelslim", _W8, _CHANNEL, _SYM, "W8A8", _QUANT, act="token", experts=False),
    Rule("msmodelslim", _W8, _CHANNEL, _SYM, "W8A8", _GROUPED, act="token", experts=True),
    Rule("msmodelslim", _W8, _CHANNEL, _SYM, "W8A8", _QUANT, act="static", experts=False),
    Rule("msmodelslim", _W4, _CHANNEL, _SYM, "W4A8", _GROUPED, act="token", experts=True, archs=_A23, multiple=16),
    Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", _QUANT, act="token", experts=False),
    Rule("compressed-tensors", _W8, _CHANNEL, _SYM, "W8A8", _GROUPED, act="token", experts=True),
    Rule("compressed-tensors", _W4, frozenset({32, 64, 128}), _SYM, "W4A16", _GROUPED, experts=True, archs=_A23,
         multiple=8, note=_EXPERT_NOTE),
    Rule("compressed-tensors", _W4, _CHANNEL, _SYM, "W4A8", _GROUPED, act="token", experts=True, archs=_A23,
         multiple=16, note=_BF16_SCALES),
)  # fmt: skip

VLLM_ASCEND_023 = Engine(
    "vllm-ascend",
    "0.23",
    "Ascend",
    (
        *_ASCEND_BOTH,
        Rule("msmodelslim", _W4, frozenset({64, 128}), _SYM, "W4A16", _WEIGHT_QUANT, act="token", experts=False,
             archs=_A23, bias=False, multiple=64,
             note="dense layers marked W4A8_DYNAMIC are multiplied with 16-bit activations"),
        Rule("msmodelslim", _W4, frozenset({256}), _SYM, "W4A16", _WEIGHT_QUANT, act="token", experts=False,
             archs=_A23, bias=False, multiple=8,
             note="dense groups of 256 run as W4A16 and need VLLM_ASCEND_ENABLE_NZ=0: the NZ layout refuses them"),
    ),
    _ASCEND_SERVE,
    ("a2", "a3", "310p"),
    _ASCEND_MIXED,
)  # fmt: skip

VLLM_ASCEND_MAIN = Engine(
    "vllm-ascend", "main", "Ascend", _ASCEND_BOTH, _ASCEND_SERVE, ("a2", "a3", "310p"), _ASCEND_MIXED
)

LLAMA_CPP = Engine(
    "llama.cpp",
    "2026-11",
    "CPU/GPU",
    (
        Rule("gguf", frozenset({4, 5, 8}), frozenset({32}), _SYM, "W{bits}A8"),
        Rule("gguf", frozenset({4, 5}), frozenset({32}), frozenset({Zero.MINS}), "W{bits}A8"),
        Rule("gguf", frozenset({6}), frozenset({16}), _SYM, "W6A8"),
    ),
    "llama-server -m {path}",
)

_BLOCKS = frozenset({16, 32, 64, 128, 256})
_ZEROS = frozenset({Zero.MIDPOINT, Zero.CODES, Zero.FLOATS})
_PER_BLOCK = "accuracy level 4: activations are quantized per token and block"

ONNXRUNTIME = Engine(
    "onnxruntime",
    "1.31",
    "CPU",
    (
        Rule("onnx", _W48, _BLOCKS, _ZEROS, "W{bits}A16", "MatMulNBits"),
        Rule("onnx", _W48, _BLOCKS, _ZEROS, "W{bits}A8", "MatMulNBits", act="token", note=_PER_BLOCK),
        Rule("onnx", _W48, _BLOCKS, _ZEROS, "W{bits}A8", "MatMulNBits", act="block", note=_PER_BLOCK),
    ),
    "python examples/onnx_answer.py {path} PROMPT",
)

ENGINES = (VLLM_CUDA, VLLM_CPU, VLLM_ASCEND_023, VLLM_ASCEND_MAIN, LLAMA_CPP, ONNXRUNTIME)


def find_engine(name: str) -> Engine | None:
    """The engine of a name, with ==release where there are several; the first release without one.

    None when no engine has the name. Raises ConfigError for a release that is not here, listing those that are.
    """
    engine, _, release = name.partition("==")
    found = [e for e in ENGINES if e.name == engine]
    if not found:
        return None
    for e in found:
        if release in ("", e.version) or release.startswith(f"{e.version}."):
            return e
    raise ConfigError(f"'{name}': the releases here are {', '.join(e.target for e in found)}")


__all__ = ["ENGINES", "Engine", "Layer", "Rule", "find_engine"]
