"""The working dtype, and hyperparameters rounded to it.

Elementwise arithmetic runs in the working dtype W: float32, or the parameter's own where that is
wider. Every scalar hyperparameter is rounded to W before it is used, and what is derived from it is
derived in W, so that a float32 run multiplies by exactly the same numbers in every framework.
"""

import functools

import numpy as np
import torch


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


Scalar = float | torch.Tensor
"""A number, or a tensor without axes, which is never read: reading one would wait for the GPU."""


def rounded(value: Scalar, dtype: torch.dtype) -> Scalar:
    """The scalar nearest to `value` in `dtype`."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype)
    if dtype in _NUMPY:
        return float(_NUMPY[dtype](value))
    return torch.tensor(value, dtype=dtype, device="cpu").item()


_NUMPY = {torch.float32: np.float32, torch.float64: np.float64}
"""NumPy's names of the working dtypes. NumPy rounds, since a tensor would be made on the user's default
device and read back from there."""


def complement(value: Scalar, dtype: torch.dtype) -> Scalar:
    """1 - value: the value is rounded to `dtype`, and the difference is computed in it."""
    return rounded(1 - rounded(value, dtype), dtype)


def rounded_product(a: Scalar, b: Scalar, dtype: torch.dtype) -> Scalar:
    """a b: both are rounded to `dtype`, and the product is computed in it."""
    return rounded(rounded(a, dtype) * rounded(b, dtype), dtype)


def bias_correction(decay: Scalar, step: int | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What an average that starts at zero is divided by: 1 - decay^step, computed in `dtype`."""
    if not isinstance(step, torch.Tensor):
        step = torch.tensor(step, device="cpu")
    decay = rounded(decay, dtype)
    if not isinstance(decay, torch.Tensor):
        decay = torch.full((), decay, dtype=dtype, device=step.device)
    return 1 - decay ** step.to(decay.device)


def rounded_multiplier(value: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    """`value`, a number or one number a matrix, in the dtype and on the device of `like`."""
    if isinstance(value, torch.Tensor):
        return value.to(device=like.device, dtype=like.dtype)
    return rounded(value, like.dtype)


@functools.cache
def dtype_name(dtype: torch.dtype | None) -> str | None:
    """The name that `normuon_core` has for a dtype, as "float16"."""
    return None if dtype is None else str(dtype).removeprefix("torch.")
