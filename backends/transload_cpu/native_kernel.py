"""Our own kernels for 4-bit (and up to 8-bit) integer weights: one class per instruction set, one layout for all."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from transload.errors import ConfigError
from transload.hal import Decoder, DecoderStep, Device, Kernel, Packed, Problem
from transload.quant import PER_CHANNEL, QTensor, QuantSpec
from transload_cpu import native_decoder, native_layout, native_library
from transload_cpu.native_ops import float_product, multiply, native_float_product, native_multiply


class NativeKernel(Kernel):
    """W4A8 with exact integer sums, and W4A16 with activations as 15-bit integers per token and group.

    15 bits keep the output within about 5e-5 of float32 (bfloat16 activations: 2e-3). x is float32, bfloat16 or
    float16; the result is rounded to x's dtype once. Weights packed by one of these kernels suit all of them.
    """

    isa: ClassVar[int]
    requires: ClassVar[str]  # the processor's feature, in words
    float_dtypes: ClassVar[tuple[torch.dtype, ...]] = tuple(native_library.DTYPES)
    layout: ClassVar[str | None] = f"native-{native_library.LAYOUT_VERSION}"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None for integer codes in groups of a multiple of 8, with activation groups that nest with them."""
        missing = native_library.unavailable()
        if missing:
            return missing
        if not native_library.supported(self.isa):
            return f"this processor has no {self.requires}"
        if p.x_dtype not in native_library.DTYPES:
            return f"x must be float32, bfloat16 or float16, not {p.x_dtype}"
        if p.experts == 0:
            return "there are no experts"
        return native_layout.refuses_weight(p.n, p.k, p.spec) or _refuses_activations(p.k, p.spec)

    def pack(self, w: QTensor) -> Packed:
        """One block of bytes: tensors["packed"], uint8."""
        return native_layout.pack(self.name, w)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`."""
        return native_layout.unpack(p)

    def verify(self, p: Packed) -> None:
        """Raises FormatError when the block's own header contradicts p."""
        native_layout.verify(p)

    def rows(self, p: Packed, index: Tensor) -> QTensor:
        """Output rows `index` (int64 [R]) of a packed linear."""
        return native_layout.rows(p, index)

    def decoder(self, d: Decoder) -> DecoderStep | str:
        """The decoder as one native call per token, where all weights are this library's or floats."""
        return native_decoder.decoder(d, self.isa)

    def float_product(self, x: Tensor, w: Tensor) -> Tensor:
        """Few rows x float32 [M, K] times w [N, K] as it is, both contiguous in host memory: float32 [M, N]."""
        run = native_float_product if torch.compiler.is_compiling() else float_product
        y: Tensor = run(x, w, self.isa)
        return y

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x [M, K] times w.T plus bias [N]: [M, N] in x's dtype."""
        if bias is not None and bias.shape != (w.n,):
            raise ConfigError(f"kernel '{self.name}': bias has shape {tuple(bias.shape)}, expected ({w.n},)")
        return self._multiply(x, w, bias, None)

    def grouped_matmul(self, x: Tensor, w: Packed, counts: Tensor, bias: Tensor | None = None) -> Tensor:
        """Rows sorted by expert, counts int64 [E] rows each: [M, N] in x's dtype, all experts in one call."""
        if w.experts is None or counts.shape != (w.experts,):
            raise ConfigError(f"kernel '{self.name}': counts {tuple(counts.shape)} for {w.experts} experts")
        if bias is not None and bias.shape != (w.experts, w.n):
            raise ConfigError(f"kernel '{self.name}': bias has shape {tuple(bias.shape)}, expected {w.experts, w.n}")
        return self._multiply(x, w, bias, counts)

    def _multiply(self, x: Tensor, w: Packed, bias: Tensor | None, counts: Tensor | None) -> Tensor:
        if x.dim() != 2 or x.shape[1] != w.k or x.dtype not in native_library.DTYPES:
            found = f"{x.dtype} {tuple(x.shape)}"
            raise ConfigError(f"kernel '{self.name}': x is {found}, expected float32, bfloat16 or float16 [M, {w.k}]")
        act = w.spec.act
        bits, group = (16, PER_CHANNEL) if act is None else (8, act.group_size)
        run = native_multiply if torch.compiler.is_compiling() else multiply
        y: Tensor = run(x, w.tensors["packed"], bias, counts, w.n, bits, group, self.isa)
        return y


class NativeAmx(NativeKernel):
    """Intel Xeon since Sapphire Rapids: tiles for 8 rows and more, AVX512-VNNI below."""

    name: ClassVar[str] = "native-amx"
    isa: ClassVar[int] = native_library.AMX_INT8
    requires: ClassVar[str] = "AMX-INT8 that this process may use"


class NativeVnni(NativeKernel):
    """AVX512-VNNI: Intel since Ice Lake, AMD since Zen 4."""

    name: ClassVar[str] = "native-vnni"
    isa: ClassVar[int] = native_library.AVX512_VNNI
    requires: ClassVar[str] = "AVX512-VNNI"


class NativeAvxVnni(NativeKernel):
    """AVX-VNNI: Intel's client processors since Alder Lake."""

    name: ClassVar[str] = "native-avx-vnni"
    isa: ClassVar[int] = native_library.AVX_VNNI
    requires: ClassVar[str] = "AVX-VNNI"


class NativeAvx2(NativeKernel):
    """AVX2 with FMA: every x86 server of the last ten years."""

    name: ClassVar[str] = "native-avx2"
    isa: ClassVar[int] = native_library.AVX2
    requires: ClassVar[str] = "AVX2, FMA and F16C"


class NativeDotprod(NativeKernel):
    """AArch64 with the dot-product extension: Kunpeng 920, Neoverse, Apple."""

    name: ClassVar[str] = "native-dotprod"
    isa: ClassVar[int] = native_library.NEON_DOTPROD
    requires: ClassVar[str] = "AArch64 dot-product instructions"


class NativePortable(NativeKernel):
    """Plain C++: the slowest of these, on any processor."""

    name: ClassVar[str] = "native-portable"
    isa: ClassVar[int] = native_library.PORTABLE
    requires: ClassVar[str] = "C++"


NATIVE_KERNELS: tuple[NativeKernel, ...] = (
    NativeAmx(),
    NativeVnni(),
    NativeAvxVnni(),
    NativeAvx2(),
    NativeDotprod(),
)


def _refuses_activations(k: int, spec: QuantSpec) -> str | None:
    act = spec.act
    if act is None:
        return None
    if act.static:
        return "static activation scales belong to the engine; activations are quantized dynamically here"
    if act.group_size == PER_CHANNEL or act.group_size >= k:
        return None
    if spec.act_order:
        return "act-order weights with activation scales per group: use scales per token"
    if act.group_size % 8:
        return f"activation groups of {act.group_size} are not a multiple of 8"
    small, large = sorted((act.group_size, k if spec.group_size == PER_CHANNEL else spec.group_size))
    if large % small and large < k:
        return f"activation groups of {act.group_size} and weight groups of {spec.group_size} do not nest"
    return None
