"""A linear layer with a quantized weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transload.errors import FormatError
from transload.runtime.below import KeptWeight
from transload.runtime.gather import Weight
from transload.runtime.placement import Target, target
from transload.runtime.weight import AnyWeight, pack


class QuantLinear(nn.Module):
    """y = x @ w.T + bias, w packed for one kernel. Stands in for nn.Linear; it has no weight until `fill`."""

    packed: AnyWeight | None
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, bias: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.register_module("packed", None)
        self.tied = False  # True: the numbers belong to another module, which saves them

    @classmethod
    def from_qtensor(
        cls,
        w: Weight,
        bias: Tensor | None = None,
        device: str | Target = "auto",
        x_dtype: torch.dtype = torch.float32,
        scheme: str | None = None,
    ) -> QuantLinear:
        """A layer ready to run. device: a name for `hal.find_device`, or a Target (then x_dtype and scheme are its).

        >>> from transload.quant import QuantSpec
        >>> from transload.reference import quantize_rtn
        >>> w = quantize_rtn(torch.randn(8, 32), QuantSpec(4, 32))
        >>> QuantLinear.from_qtensor(w, device="cpu")(torch.ones(2, 3, 32)).shape
        torch.Size([2, 3, 8])
        """
        to = device if isinstance(device, Target) else target(device, scheme, x_dtype)
        layer = cls(w.k, w.n, None if bias is None else bias.to(to.torch_device))
        layer.fill("weight", w, to)
        return layer

    def fill(self, member: str, w: Weight | KeptWeight, to: Target) -> None:
        """Chooses a kernel for the weight and packs it. Raises NoKernel, FormatError for a shape that is not ours."""
        if (w.n, w.k) != (self.out_features, self.in_features) or w.experts:
            raise FormatError(f"the weight is {(w.n, w.k)}, expected {(self.out_features, self.in_features)}")
        self.packed = pack(w, to)

    def weight_of(self, member: str = "weight") -> AnyWeight:
        """The packed weight."""
        assert self.packed is not None
        return self.packed

    def weight_shape(self, member: str = "weight") -> tuple[int, ...]:
        """(N, K)."""
        return self.out_features, self.in_features

    def qtensor(self, member: str = "weight") -> Weight:
        """The exact weight, for saving."""
        return self.packed.qtensor()  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        """Model code that reads `weight` directly (its dtype, mostly) gets the dequantized weight."""
        if name == "weight" and self._modules.get("packed") is not None:
            return self.qtensor().dequantize()
        return super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        """x: float [..., in_features] -> [..., out_features] in x's dtype."""
        # Straight from the dictionaries: attribute access costs microseconds, and a token takes hundreds of layers.
        return self._modules["packed"].matmul(x, self._parameters["bias"])  # type: ignore[union-attr, no-any-return, operator]

    def extra_repr(self) -> str:
        """Shape; the packed weight prints its own line."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
