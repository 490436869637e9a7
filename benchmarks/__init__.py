"""Measurements behind the numbers in the README: `python -m benchmarks.<name> --json`."""
