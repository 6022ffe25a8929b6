"""The working dtype, and hyperparameters rounded to it.

Elementwise arithmetic runs in the working dtype W: float32, or the parameter's own where that is
wider. Every scalar hyperparameter is rounded to W before it is used, and what is derived from it is
derived in W, so that a float32 run multiplies by exactly the same numbers in every framework.
"""

import torch


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def rounded(value: float | torch.Tensor, dtype: torch.dtype) -> float:
    """The scalar nearest to `value` in `dtype`."""
    return torch.tensor(float(value), dtype=dtype).item()


def complement(value: float | torch.Tensor, dtype: torch.dtype) -> float:
    """1 - value, the value rounded to `dtype` first and the difference computed in it."""
    return (1 - torch.tensor(float(value), dtype=dtype)).item()


def bias_correction(decay: float | torch.Tensor, step: int, dtype: torch.dtype) -> float:
    """1 - decay^step, computed in `dtype`: what an average that starts at zero is divided by."""
    return (1 - torch.tensor(float(decay), dtype=dtype) ** step).item()


def rounded_multiplier(value: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    """`value`, a number or one number a matrix, in the dtype and on the device of `like`."""
    if isinstance(value, torch.Tensor):
        return value.to(device=like.device, dtype=like.dtype)
    return rounded(value, like.dtype)
