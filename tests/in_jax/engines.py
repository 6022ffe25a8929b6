"""The two engines of a step, XLA and the kernels, as tests without a GPU run them."""

from typing import Any

import jax.numpy as jnp

from normuon_core import RECIPES
from normuon_core.kernels_support import kernels_support

KERNELS: dict[str, Any] = dict(backend="triton", compute_dtype=jnp.float32, steps=1)
"""Keywords of an optimizer or of `orthogonalize` that runs by kernels under Triton's interpreter: it
multiplies no bfloat16, and takes a moment for each product of the polynomial."""


def engine_of(recipe: str) -> dict[str, str]:
    """Keywords beside a recipe's name that leave it to XLA if no kernel can run it."""
    return {} if kernels_support(RECIPES[recipe]) else {"backend": "auto"}
