"""The parity tests' own settings."""

import jax
import pytest
import torch

from parity_tests.interpreted import interpreted_kernels

# The test runner starts one process a core; torch's own threads would only compete with them.
torch.set_num_threads(1)


@pytest.fixture
def interpreted():
    """The kernels under Triton's interpreter, in both frameworks."""
    if jax.default_backend() == "gpu":
        pytest.skip("the kernels are compiled here, and not interpreted")
    with interpreted_kernels():
        yield
