"""Four-bit floats, read only: MXFP4 and NVFP4 as compressed-tensors, ModelOpt and gpt-oss store them.

Codes are E2M1 (0 .5 1 1.5 2 3 4 6, bit 3 is the sign), two a byte, low nibble first along K: codes 3, 12 -> byte 0xc3.

    compressed-tensors   m.weight_packed uint8 [N, K/2]
      mxfp4              m.weight_scale uint8 [N, K/32]           scale = 2**(s - 127)
      nvfp4              m.weight_scale float8_e4m3fn [N, K/16], m.weight_global_scale float32 [1]: scale / global
    ModelOpt nvfp4       m.weight uint8 [N, K/2], m.weight_scale as above, m.weight_scale_2 float32: scale * scale_2
    gpt-oss mxfp4        m_blocks uint8 [E, N, K/32, 16], m_scales uint8 [E, N, K/32]: the experts of a layer, stacked

Source: compressed-tensors 0.20 `compressors/`, transformers 5.23 `integrations/mxfp4.py`, OCP MX 1.0. The values times
two are whole numbers, so `transload.rewrite` turns these weights into int8 exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import FormatError
from transload.formats import stored
from transload.formats.base import Entry, Format, Source, naming
from transload.headers.info import shown
from transload.quant import Grid, QTensor, QuantSpec, Zero

MX, NV = QuantSpec(4, 32, Grid.E2M1, Zero.NONE), QuantSpec(4, 16, Grid.E2M1, Zero.NONE)


class GptOss(Format):
    """gpt-oss checkpoints: stacked experts in MXFP4."""

    name: ClassVar[str] = "mxfp4"

    def detects(self, source: Source) -> bool:
        """True for quant_method mxfp4."""
        return stored.method(source) == self.name

    def entries(self, source: Source) -> dict[str, Entry]:
        """A stack of experts [E, N, K] for every pair of blocks and scales."""
        modules = [name.removesuffix("_blocks") for name in source.infos if name.endswith("_blocks")]
        return stored.with_floats(source, [_stack_entry(source, m) for m in modules])

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes and power-of-two scales."""
        with naming(source, entry):
            codes = bits.unpack(source.read(f"{entry.name}_blocks"), 4, 32).reshape(entry.shape)
            return QTensor(MX, codes, powers_of_two(source.read(f"{entry.name}_scales")))

    def experts(self, source: Source, entry: Entry) -> Iterator[QTensor | Tensor]:
        """The experts one by one: a whole stack in a byte per code would be the largest thing in memory by far."""
        if entry.spec is None:
            yield from super().experts(source, entry)
            return
        for e in range(entry.shape[0]):
            with naming(source, entry):
                codes = bits.unpack(stored.expert(source, f"{entry.name}_blocks", e), 4, 32).reshape(entry.shape[1:])
                w = QTensor(MX, codes, powers_of_two(stored.expert(source, f"{entry.name}_scales", e)))
            yield w


class ModelOpt(Format):
    """ModelOpt NVFP4 checkpoints."""

    name: ClassVar[str] = "modelopt_fp4"

    def detects(self, source: Source) -> bool:
        """True for modules with the two scales of ModelOpt beside packed bytes."""
        declared = stored.method(source) == "modelopt" or source.json("hf_quant_config.json") is not None
        return declared and bool(stored.modules(source, "weight_scale_2"))

    def entries(self, source: Source) -> dict[str, Entry]:
        """Modules with a weight_scale_2; a scalar input_scale belongs to activations and is left out."""
        return stored.with_floats(
            source, [_modelopt_entry(source, m) for m in stored.modules(source, "weight_scale_2")]
        )

    def decode(self, source: Source, entry: Entry) -> QTensor:
        """Codes, and the product of both scales."""
        module, k = entry.name, entry.shape[1]
        scales = source.read(f"{module}.weight_scale").float() * source.read(f"{module}.weight_scale_2").float()
        with naming(source, entry):
            return QTensor(NV, bits.unpack(source.read(f"{module}.weight"), 4, k), scales)


def packed_entry(source: Source, module: str) -> Entry:
    """The entry of a compressed-tensors module whose weight_packed holds E2M1 bytes.

    Raises FormatError for shapes that contradict each other.
    """
    packed = stored.nonempty(stored.need(source, f"{module}.weight_packed", ("U8",), (None, None), "for 4-bit floats"))
    n, k = packed.shape[0], 2 * packed.shape[1]
    scale = source.infos.get(f"{module}.weight_scale")
    spec = NV if scale is not None and scale.dtype == "F8_E4M3" else MX
    _check_divides(source, module, k, spec.group_size)
    names = ["weight_packed", "weight_scale"]
    dtypes = ("F8_E4M3",) if spec is NV else ("U8", "F8_E8M0")
    stored.need(source, f"{module}.weight_scale", dtypes, (n, k // spec.group_size), f"for N={n}, K={k}")
    if spec is NV:
        stored.need(source, f"{module}.weight_global_scale", ("F32",), (1,), "for NVFP4")
        names += ["weight_global_scale", "input_global_scale"]
    return stored.entry(source, module, spec, (n, k), (f"{module}.{name}" for name in names))


def decode_packed(source: Source, entry: Entry) -> QTensor:
    """The weight of an entry made by `packed_entry`."""
    module, k = entry.name, entry.shape[1]
    scales = source.read(f"{module}.weight_scale")
    if entry.spec == NV:
        scales = scales.float() / source.read(f"{module}.weight_global_scale")
    else:
        scales = powers_of_two(scales)
    with naming(source, entry):
        return QTensor(entry.spec or MX, bits.unpack(source.read(f"{module}.weight_packed"), 4, k), scales)


def powers_of_two(exponents: Tensor) -> Tensor:
    """Scales of MX blocks: bytes s as float32 2**(s - 127); 255 is NaN.

    >>> powers_of_two(torch.tensor([127, 130, 126], dtype=torch.uint8))
    tensor([1.0000, 8.0000, 0.5000])
    """
    return exponents.view(torch.float8_e8m0fnu).float()


def _stack_entry(source: Source, module: str) -> Entry:
    blocks = stored.nonempty(stored.need(source, f"{module}_blocks", ("U8",), (None, None, None, 16)))
    e, n, groups, _ = blocks.shape
    scales = stored.need(source, f"{module}_scales", ("U8", "F8_E8M0"), (e, n, groups), f"for {e} experts")
    return stored.entry(source, module, MX, (e, n, 32 * groups), (blocks.name, scales.name))


def _modelopt_entry(source: Source, module: str) -> Entry:
    packed = stored.nonempty(stored.need(source, f"{module}.weight", ("U8",), (None, None), "for NVFP4"))
    n, k = packed.shape[0], 2 * packed.shape[1]
    _check_divides(source, module, k, 16)
    stored.need(source, f"{module}.weight_scale", ("F8_E4M3",), (n, k // 16), f"for N={n}, K={k}")
    outer = source.infos[f"{module}.weight_scale_2"]
    stored.need(source, outer.name, ("F32",), () if outer.shape == () else (1,))
    names = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    return stored.entry(source, module, NV, (n, k), (f"{module}.{name}" for name in names))


def _check_divides(source: Source, module: str, k: int, size: int) -> None:
    if k % size:
        raise FormatError(f"{source.path}: module {shown(module)}: K={k} is not a multiple of its blocks of {size}")
