"""The Ascend product families: what the operators' pages call "Atlas A2", "Atlas A3", "Atlas inference" and "950"."""

from __future__ import annotations

import enum
from functools import cache


class Product(enum.Enum):
    """A family that operators support or do not support as a whole; the value is how messages name it."""

    A2 = "Atlas A2 (910B)"
    A3 = "Atlas A3 (910C)"
    P310 = "Atlas inference series (310P)"
    A5 = "Ascend 950"
    OLD = "Ascend 910A or older"

    @property
    def int4(self) -> bool:
        """True when the matmul operators take 4-bit integer weights."""
        return self in (Product.A2, Product.A3)


# torch_npu.npu.get_soc_version() by family, as vllm-ascend 0.23 maps it (`utils.py`, device types).
_SOC_VERSIONS = (
    (range(200, 206), Product.P310),
    (range(220, 226), Product.A2),
    (range(250, 256), Product.A3),
    (range(260, 270), Product.A5),
)

_ARCHS = {"910B": Product.A2, "910C": Product.A3, "310P": Product.P310, "950": Product.A5}


def product_of_soc(version: int) -> Product:
    """The family of a number that `torch_npu.npu.get_soc_version()` returns."""
    return next((product for versions, product in _SOC_VERSIONS if version in versions), Product.OLD)


def product_of(arch: str) -> Product:
    """The family of a `Device.arch`: "910B", "910C", "310P", "950"; anything else is too old for these operators."""
    return _ARCHS.get(arch, Product.OLD)


@cache
def product_here() -> Product:
    """The family of this machine's NPUs; all NPUs of one machine are of one family."""
    import torch_npu

    return product_of_soc(int(torch_npu.npu.get_soc_version()))
