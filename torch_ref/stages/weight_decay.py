"""Stage 4: weight decay, of those entries alone that the update moves towards zero as well."""

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
    """Adds weight decay to an update where both move the parameter towards zero.

    update + weight_decay wd_mul [direction * param >= 0] param. The update is what will be subtracted
    from the parameter, so that it moves an entry of its own sign towards zero. An entry where the
    product is zero decays.

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
        # Signs are multiplied, not numbers: these may underflow to zero, and a zero product decays.
        agrees = (update if direction is None else direction).sign() * param.sign() >= 0
        decay = decay.masked_fill(~agrees, 0.0)
    return update + decay
