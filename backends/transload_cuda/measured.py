"""Configurations that were measured, by the device's name as torch gives it; read by `configs`.

An entry is `Ask.key: (block_m, block_n, block_k, warps, stages, splits)`, copied from the cache file that `tune` writes
on that device. It is empty: nothing has been measured on a device yet, and every device gets the default.
"""

from __future__ import annotations

MEASURED: dict[str, dict[str, tuple[int, int, int, int, int, int]]] = {}
