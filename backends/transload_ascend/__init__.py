"""Transload's ascend backend."""
