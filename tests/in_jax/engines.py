"""The two engines of a step, XLA and the kernels, as tests without a GPU run them."""

from typing import Any

import jax.numpy as jnp

KERNELS: dict[str, Any] = dict(backend="triton", compute_dtype=jnp.float32, steps=1)
"""Keywords of an optimizer or of `orthogonalize` that runs by kernels under Triton's interpreter: it
multiplies no bfloat16, and takes a moment for each product of the polynomial."""
