"""The two engines of a step, XLA and the kernels, as tests without a GPU run them."""

from typing import Any

import jax.numpy as jnp
import pytest

from normuon_core import RECIPES
from normuon_core.kernels_support import kernels_support

KERNELS: dict[str, Any] = dict(backend="triton", compute_dtype=jnp.float32, steps=1)
"""Keywords of an optimizer or of `orthogonalize` that runs by kernels under Triton's interpreter: it
multiplies no bfloat16, and takes a moment for each product of the polynomial."""


def skip_what_kernels_lack(make: Any, recipe: str) -> None:
    """Skips a test of an optimizer with `KERNELS` and a recipe that no kernel can run."""
    keywords = getattr(make, "keywords", {})
    if keywords.get("backend") == "triton" and not kernels_support(RECIPES[recipe]):
        pytest.skip("no kernel runs this recipe")
