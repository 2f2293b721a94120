"""Transload's cuda backend."""
