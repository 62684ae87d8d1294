"""Benchmarks: ``python -m sb3_consistency benchmark SUITE``."""
