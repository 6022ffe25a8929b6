"""The Triton kernels of both frameworks: source, geometry, launches, tiles."""
