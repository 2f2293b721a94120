"""Transload on Huawei Ascend NPUs."""

from transload_ascend.backend import backend

__all__ = ["backend"]
