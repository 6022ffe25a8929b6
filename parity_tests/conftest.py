"""The parity tests' own settings."""

import importlib.util

import jax
import pytest
import torch

# Triton has builds for Linux alone; elsewhere these have nothing to test.
_OF_KERNELS = ["test_kernels.py", "test_kernel_hyperparameters.py", "test_gpu.py"]
collect_ignore = [] if importlib.util.find_spec("triton") else _OF_KERNELS

# The test runner starts one process a core; torch's own threads would only compete with them.
torch.set_num_threads(1)


@pytest.fixture
def interpreted():
    """The kernels under Triton's interpreter, in both frameworks."""
    if jax.default_backend() == "gpu":
        pytest.skip("the kernels are compiled here, and not interpreted")
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from parity_tests.interpreted import interpreted_kernels

    with interpreted_kernels():
        yield
