"""Benchmarks, runnable one by one; results with their device, versions and command are in ``results/``."""
