"""Sizes as people write them: "80 GB", "64GiB", "32k", 0.5 TB; and bytes as people read them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator

from transload.errors import ConfigError

_UNITS = {
    "": 1, "B": 1, "K": 1024, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "PB": 10**15,
    "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(?P<number>\d{1,18}(\.\d{1,9})?)\s*(?P<unit>[A-Za-z]{0,3})\s*")
_TOKENS = re.compile(r"\s*(?P<number>\d{1,12}(\.\d{1,6})?)\s*(?P<unit>[kKmM]?)\s*")
LARGEST = 1 << 60


def parse_size(value: object) -> int:
    """Bytes from a number or a text with a unit (GB = 10**9, GiB = 2**30). Raises ConfigError otherwise.

    >>> parse_size("64 GiB")
    68719476736
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ConfigError(f"size {value!r:.40}: expected a number of bytes or a text such as '80 GB'")
    match = _SIZE.fullmatch(value if isinstance(value, str) else format(value, "f"))
    if match is None or match["unit"].upper() not in _UNITS:
        raise ConfigError(
            f"size {value!r:.40}: expected a positive number with B, KB, MB, GB, TB, KiB, MiB, GiB or TiB"
        )
    size = round(float(match["number"]) * _UNITS[match["unit"].upper()])
    if not 0 <= size <= LARGEST:
        raise ConfigError(f"size {value!r:.40}: larger than an exbibyte")
    return size


def parse_tokens(value: object) -> int:
    """Tokens from a number or a text: 32k = 32768, 1m = 1048576, 32000 as written. Raises ConfigError otherwise.

    >>> parse_tokens("32k")
    32768
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ConfigError(f"token count {value!r:.40}: expected a number such as 32768 or 32k")
    match = _TOKENS.fullmatch(str(value))
    if match is None:
        raise ConfigError(f"token count {value!r:.40}: expected a positive number such as 32768 or 32k")
    scale = {"": 1, "k": 1024, "m": 1 << 20}[match["unit"].lower()]
    count = float(match["number"]) * scale
    if count != int(count) or count > 1 << 40:
        raise ConfigError(f"token count {value!r:.40}: not a whole, sensible number of tokens")
    return int(count)


Size = Annotated[int, BeforeValidator(parse_size)]
Tokens = Annotated[int, BeforeValidator(parse_tokens)]


def show_bytes(size: float) -> str:
    """Bytes for people, in GiB or MiB: 3.42 GiB.

    >>> show_bytes(3_672_000_000)
    '3.42 GiB'
    """
    if abs(size) >= 1 << 40:
        return f"{size / (1 << 40):.2f} TiB"
    if abs(size) >= 100 << 20:
        return f"{size / (1 << 30):.2f} GiB"
    if abs(size) >= 1 << 20:
        return f"{size / (1 << 20):.1f} MiB"
    return f"{size / (1 << 10):.1f} KiB" if abs(size) >= 1 << 10 else f"{size:.0f} B"
