"""Benchmarks on real networks, beside other tools, on the same files and data."""
