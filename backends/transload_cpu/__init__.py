"""Transload's cpu backend."""
