"""What every test runs under: strict promotion, no silent rank broadcasting, GPU tests only on GPUs."""

from pathlib import Path

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_addoption(parser):
    parser.addoption(
        "--golden-dir",
        type=Path,
        default=None,
        help="folder of golden traces for parity_tests/test_golden.py (default: the repository's)",
    )


def pytest_collection_modifyitems(items):
    if jax.default_backend() == "gpu":
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; JAX sees none"))


@pytest.fixture
def x64():
    """float64 in JAX, for tests that need it; users' default is off, and so is the tests'."""
    with jax.enable_x64(True):
        yield
