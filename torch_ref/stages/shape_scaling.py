"""Stage 5: how large the update of a matrix is, given its shape."""

import torch

from normuon_core import ShapeRule, shape_factor
from normuon_core.shape_rules import RMS_FLOOR
from torch_ref.leaves.dtypes import rounded_multiplier
from torch_ref.stages.norms import frobenius_norm


def scale_by_shape(
    update: torch.Tensor,
    *,
    rule: ShapeRule,
    output_is_rows: bool = True,
    lr_mul: float | torch.Tensor = 1.0,
    direction: torch.Tensor | None = None,
    sides: tuple[int, int] | None = None,
    norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scales an update by its matrix's shape and its learning rate multiplier: k lr_mul update.

    k is the factor of `rule` for the shape.

    Args:
      update: (..., rows, columns) in the working dtype, not modified.
      rule: see `normuon_core.shape_factor`; `rms` gives `direction` a root mean square of 0.2.
      output_is_rows: which side of the stored matrix the output neurons are.
      lr_mul: a number, or a tensor that broadcasts against `update`; k lr_mul is rounded once.
      direction: whose norm the `rms` rule takes, where decay is already in `update`; None is
        `update`.
      sides: (rows, columns) of the whole matrices where `update` holds parts of them; None is its own.
      norm: of the whole matrices' `direction`, broadcasting against `update`, where that is known or
        parts do not tell it; None computes it. For the `rms` rule alone.

    Returns:
      A new tensor like `update`.
    """
    rows, columns = update.shape[-2:] if sides is None else sides
    k = shape_factor(rule, *((rows, columns) if output_is_rows else (columns, rows)))
    if rule == "rms":
        if norm is None:
            norm = frobenius_norm(update if direction is None else direction)
        scale = torch.full_like(norm, k) / norm.clamp_min(RMS_FLOOR)
        return update * (scale * rounded_multiplier(lr_mul, update))
    return update * rounded_multiplier(k * lr_mul, update)
