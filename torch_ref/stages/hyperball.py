"""The last stage of a recipe whose matrices keep their norms: a step on the hyperball."""

import torch

from normuon_core import MatrixView
from torch_ref.leaves.dtypes import Scalar, rounded, rounded_multiplier, working_dtype
from torch_ref.matrices.views import from_blocks, to_blocks
from torch_ref.stages.norms import frobenius_norm


def to_hyperball(
    update: torch.Tensor,
    param: torch.Tensor,
    *,
    lr: Scalar,
    radius: float | torch.Tensor,
    lr_mul: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """The increment that turns every matrix against its update and leaves its norm at `radius`.

    R N(param - lr lr_mul R N(update)) - param with N(x) = x / |x|, the Frobenius norm of one matrix. The
    scale of the update does not matter. A matrix without an update, and one that is zero, is left alone.

    Source: MuonH, https://tinyurl.com/muonh, and `MuonHyperball` of NVIDIA's Emerging-Optimizers.

    Args:
      update: (..., rows, columns) in the working dtype: the direction of ascent, not modified.
      param: the same shape and dtype.
      lr: the step over the norm, about the angle: a number or a tensor without axes.
      radius: R, a number or what broadcasts to (..., 1, 1).
      lr_mul: a number, or a tensor that broadcasts against `update`.

    Returns:
      A new tensor like `param`.
    """
    length, own = frobenius_norm(update), frobenius_norm(param)
    rate = rounded(lr, param.dtype) * rounded_multiplier(lr_mul, update)
    radius = rounded_multiplier(radius, update)
    target = param - rate * radius * (update / _or_one(length))
    reached = frobenius_norm(target)
    still = (length == 0) | (own == 0) | (reached == 0)
    return (target * (radius / _or_one(reached)) - param).masked_fill(still, 0.0)


def starting_radii(param: torch.Tensor, view: MatrixView) -> torch.Tensor:
    """The norm of each matrix of a whole parameter, in its working dtype.

    It has the parameter's rank, with size 1 on the sides; the norms of several output blocks stand side
    by side on the output axis.
    """
    blocks = to_blocks(param.detach().to(working_dtype(param.dtype)), view)
    return from_blocks([frobenius_norm(block) for block in blocks], view)


def _or_one(norm: torch.Tensor) -> torch.Tensor:
    return norm.masked_fill(norm == 0, 1.0)
