"""The Triton kernels from here: backend, launches, the polar factor."""
