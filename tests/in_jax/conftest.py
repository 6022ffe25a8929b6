"""The tests' own settings."""

import functools

import jax.numpy as jnp
import pytest

import optax_normuon
from tests.in_jax.engines import KERNELS


@pytest.fixture(params=["XLA", "by kernels"])
def normuon(request):
    """`optax_normuon.normuon`, by each engine."""
    if request.param == "XLA":
        return optax_normuon.normuon
    request.getfixturevalue("interpreted")
    return functools.partial(optax_normuon.normuon, **KERNELS)


@pytest.fixture(autouse=True)
def kernels_run_where_a_test_names_them(request):
    """Under the interpreter, in tests whose parameters say "by kernels"."""
    if "by kernels" in request.node.name:
        request.getfixturevalue("interpreted")


@pytest.fixture(params=["float16", "bfloat16", "float32", "float64"])
def dtype(request):
    """Every dtype of parameters, float64 included."""
    if request.param == "float64":
        if "by kernels" in request.node.name:
            pytest.skip("the kernels take no float64")
        request.getfixturevalue("x64")
    return jnp.dtype(request.param)
