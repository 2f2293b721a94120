"""Benchmarks: the same data for every kernel and every peer, timed turn by turn, with the error beside every time."""
