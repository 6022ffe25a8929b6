"""The tests' own settings."""

import functools

import pytest

import optax_normuon
from tests.engines import KERNELS


@pytest.fixture(params=["XLA", "by kernels"])
def normuon(request):
    """`optax_normuon.normuon`, by each engine."""
    if request.param == "XLA":
        return optax_normuon.normuon
    request.getfixturevalue("interpreted")
    return functools.partial(optax_normuon.normuon, **KERNELS)
