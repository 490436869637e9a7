"""Small models, a workload and pictures: what `make demo` shows."""
