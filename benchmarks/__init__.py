"""How fast: `python -m benchmarks`, and `python -m benchmarks.tune` for the kernels' tiles."""
