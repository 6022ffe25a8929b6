"""Stage 4: weight decay, only where it pulls the way the update does."""

import torch

from torch_ref.leaves.dtypes import Scalar, rounded, rounded_multiplier


def add_cautious_weight_decay(
    update: torch.Tensor,
    param: torch.Tensor,
    *,
    weight_decay: Scalar,
    wd_mul: float | torch.Tensor = 1.0,
    cautious: bool = True,
    direction: torch.Tensor | None = None,
) -> torch.Tensor:
    """update + weight_decay wd_mul [direction * param >= 0] param.

    The update here is what will be subtracted from the parameter, so where the signs agree both
    move it towards zero. A zero product decays.

    Source: cautious weight decay, arXiv 2510.12402.

    Args:
      update: (..., rows, columns) in the working dtype, not modified.
      param: the same shape and dtype.
      weight_decay: the factor, before any learning rate: a number or a tensor without axes.
      wd_mul: a number, or a tensor that broadcasts against `update`.
      cautious: False decays every entry.
      direction: what the mask compares with the parameter; None is `update` itself.

    Returns:
      A new tensor like `update`.
    """
    factor = rounded(weight_decay, update.dtype) * rounded_multiplier(wd_mul, update)
    decay = param * factor
    if cautious:
        # Not the product's sign: it can underflow to zero, which counts as agreement.
        agrees = (update if direction is None else direction).sign() * param.sign() >= 0
        decay = decay.masked_fill(~agrees, 0.0)
    return update + decay
