"""PyTorch's own 4-bit matmul for bfloat16, `aten._weight_int4pack_mm` (the "tinygemm" of gpt-fast).

The operator computes w = (code - 8) * scale + zero with scale and zero in bfloat16, so only symmetric weights with
bfloat16 scales keep their numbers; everything else is refused. Its tile order belongs to the GPU, so `place` makes it
there, and `unpack` of a placed weight reads the codes back as the product with an identity matrix.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from transload import bits
from transload.errors import ConfigError
from transload.hal import Device, Kernel, Packed, Problem
from transload.quant import Grid, QTensor, Zero
from transload_cuda.device import arch_number, on_device
from transload_cuda.layouts import check_placed, check_x

GROUPS = (32, 64, 128, 256)
INNER_TILES = 8  # steps of 16 inputs that a thread keeps together; the operator takes 2, 4 or 8
UNPACK_ROWS = 1024  # inputs read back at a time


class Int4PackKernel(Kernel):
    """Symmetric 4-bit weights in groups of 32 to 256 with bfloat16 scales, bfloat16 x, on Ampere or later."""

    name: ClassVar[str] = "torch-int4pack"

    def refuses(self, p: Problem, device: Device) -> str | None:
        """None where the operator keeps every number."""
        spec, grid = p.spec, p.spec.grid.value
        checks = (
            (spec.act is not None, f"16-bit activations only, not {spec.act}"),
            (p.experts is not None, "dense layers only"),
            (arch_number(device.arch) < 80, f"it needs compute capability 8.0 or later, not {device.arch}"),
            (p.x_dtype != torch.bfloat16, f"x must be bfloat16, not {p.x_dtype}"),
            (spec.bits != 4 or spec.grid is not Grid.INT, f"4-bit integers only, not {spec.bits}-bit {grid}"),
            (spec.zero is not Zero.MIDPOINT, f"symmetric weights only: it would round {spec.zero.value} to bfloat16"),
            (spec.scale_dtype != torch.bfloat16, f"it would round {spec.scale_dtype} scales to bfloat16"),
            (spec.act_order, "no act-order"),
            (spec.group_size not in GROUPS, f"groups of 32, 64, 128 or 256 only, not {spec.group_size}"),
            (p.k % max(spec.group_size, 16 * INNER_TILES) != 0, f"K={p.k} is not a multiple of the group and of 128"),
            (p.n % 8 != 0, f"N={p.n} is not a multiple of 8"),
        )  # fmt: skip
        return next((reason for refused, reason in checks if refused), None)

    def pack(self, w: QTensor) -> Packed:
        """`codes` uint8 [N, K / 2], the even input in the high nibble; `scale_and_zero` bfloat16 [G, N, 2]."""
        swapped = w.codes.reshape(w.n, w.k // 2, 2).flip(-1).reshape(w.n, w.k)
        scale = w.scales.T.contiguous()
        tensors = {"codes": bits.pack(swapped, 4), "scale_and_zero": torch.stack((scale, torch.zeros_like(scale)), -1)}
        return Packed(self.name, w.spec, w.n, w.k, tensors)

    def unpack(self, p: Packed) -> QTensor:
        """The exact inverse of `pack`, also of a placed weight."""
        scales = p.tensors["scale_and_zero"][..., 0].T.contiguous()
        if "tiles" in p.tensors:
            return QTensor(p.spec, _codes_of_tiles(p), scales)
        swapped = bits.unpack(p.tensors["codes"], 4, p.k).reshape(p.n, p.k // 2, 2)
        return QTensor(p.spec, swapped.flip(-1).reshape(p.n, p.k), scales)

    def place(self, p: Packed, device: torch.device) -> Packed:
        """`tiles` int32 in the GPU's order instead of `codes`.

        Raises BackendError when it does not fit, ConfigError for a device that is no GPU.
        """
        with on_device(self.name, f"{p.nbytes} bytes of weight"):
            try:
                tiles = torch.ops.aten._convert_weight_to_int4pack(p.tensors["codes"].to(device), INNER_TILES)
            except NotImplementedError as e:
                raise ConfigError(f"kernel '{self.name}': it runs on CUDA devices, not on {device}") from e
            scale = p.tensors["scale_and_zero"].to(device)
        return replace(p, tensors={"tiles": tiles, "scale_and_zero": scale})

    def matmul(self, x: Tensor, w: Packed, bias: Tensor | None = None) -> Tensor:
        """x bfloat16 [M, K] times w.T plus bias [N]: [M, N]."""
        check_x(self.name, x, w, bias, None)
        if x.dtype != torch.bfloat16:
            raise ConfigError(f"kernel '{self.name}': x is {x.dtype}, expected bfloat16")
        if x.shape[0] == 0:
            return x.new_empty(0, w.n)
        check_placed(w, "tiles")
        tiles, sides = w.tensors["tiles"], w.tensors["scale_and_zero"]
        with on_device(self.name, f"x [M={x.shape[0]}, K={w.k}] to y [N={w.n}]"):
            y: Tensor = torch.ops.aten._weight_int4pack_mm(x.contiguous(), tiles, w.spec.group_size, sides)
        return y if bias is None else y + bias.to(y.dtype)


def _codes_of_tiles(p: Packed) -> Tensor:
    """uint8 [N, K]: with scale 1 and zero 8, the product with rows of the identity is the codes themselves."""
    tiles = p.tensors["tiles"]
    plain = torch.empty_like(p.tensors["scale_and_zero"])
    plain[..., 0], plain[..., 1] = 1, p.spec.midpoint
    parts = []
    for start in range(0, p.k, UNPACK_ROWS):
        rows = min(UNPACK_ROWS, p.k - start)
        unit = torch.zeros(rows, p.k, dtype=torch.bfloat16, device=tiles.device)
        unit[torch.arange(rows), torch.arange(start, start + rows)] = 1
        parts.append(torch.ops.aten._weight_int4pack_mm(unit, tiles, p.spec.group_size, plain).to(torch.uint8).T)
    return torch.cat(parts, dim=1).contiguous()
