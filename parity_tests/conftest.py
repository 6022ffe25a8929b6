"""The parity tests' own settings."""

import importlib.util

import torch

# Triton has builds for Linux alone; elsewhere these have nothing to test.
_OF_KERNELS = ["test_kernels.py", "test_kernel_hyperparameters.py", "test_gpu.py"]
collect_ignore = [] if importlib.util.find_spec("triton") else _OF_KERNELS

# The test runner starts one process a core; torch's own threads would only compete with them.
torch.set_num_threads(1)
