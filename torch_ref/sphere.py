"""Slices of constant norm, as in nGPT: steps along a sphere, and projections to it and its tangents.

Functions on one tensor, the twins of the transformations in `optax_normuon.sphere`. Each returns what is
to be added to the parameter, or an update, and modifies nothing:

    with torch.no_grad():
        weight.add_(to_sphere(momentum, weight, lr=0.02, axis=1))
"""

from typing import Literal

import torch

from normuon_core.hyperparameters import check_choice, check_radius
from torch_ref.leaves.dtypes import Scalar, rounded, rounded_multiplier, working_dtype

Path = Literal["geodesic", "retraction"]
Angle = Literal["rate", "tangent"]
Axes = int | tuple[int, ...]

_NO_TANGENT = 4
"""In units of rounding: how much of an update lies off its slice where that is rounding alone."""


def to_sphere(
    update: torch.Tensor,
    param: torch.Tensor,
    *,
    lr: Scalar,
    axis: Axes = -1,
    path: Path = "geodesic",
    angle: Angle = "rate",
    radius: float | torch.Tensor = 1.0,
    lr_mul: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """The increment that turns every slice by an angle against its update, with norm `radius` after it.

    With w^ = w / |w| and the tangent t = u - w^ <w^, u>,

        geodesic:    w <- R (w^ cos theta - t^ sin theta)
        retraction:  w <- R N(w^ - theta t^)

    theta is lr lr_mul (`angle="rate"`) or lr lr_mul |t| ("tangent"). A slice whose update has no
    tangent, beyond rounding, is left alone, and so is one that is zero. Source: nGPT, arXiv 2410.01131.

    Args:
      update: u, the direction of ascent, of any shape.
      param: w, the same shape.
      lr: a number or a tensor without axes.
      axis: along which axis or axes the slices lie; -1 is the inputs of an (out, in) weight.
      path, angle: as above.
      radius: R, a number above 0, or the slices' norms with size 1 on `axis`, as
        `torch.linalg.vector_norm(param, dim=axis, keepdim=True)` has them at the start.
      lr_mul: a number, or a tensor that broadcasts to the slices' norms.

    Returns:
      A new tensor in the dtype of `param`; the arithmetic is float32, or that dtype where it is wider.

    Raises:
      ValueError: an unknown path or angle, or a radius that is not positive.
    """
    check_choice("path", path, Path)
    check_choice("angle", angle, Angle)
    check_radius("radius", radius)
    dtype = working_dtype(param.dtype)
    p, u = param.to(dtype), update.to(dtype)
    w = p / _or_one(_norm(p, axis))
    t = _tangent(u, w, axis)
    length = _norm(t, axis)
    # A NaN is not left alone: the comparison is false for it.
    still = (length <= _NO_TANGENT * torch.finfo(dtype).eps * _norm(u, axis)) | (
        _norm(p, axis) == 0
    )
    theta = rounded(lr, dtype) * rounded_multiplier(lr_mul, p)
    theta = theta * length if angle == "tangent" else torch.full_like(length, 1.0) * theta
    if path == "geodesic":
        along, across = theta.cos(), theta.sin()
    else:
        # w^ and t^ are orthogonal, so the norm of w^ - theta t^ is that of (1, theta).
        along = (1 + theta.square()).rsqrt()
        across = theta * along
    new = rounded_multiplier(radius, p) * (
        w * along - t * (across / length.masked_fill(still, 1.0))
    )
    return (new - p).masked_fill(still, 0.0).to(param.dtype)


def project_to_sphere(
    increment: torch.Tensor,
    param: torch.Tensor,
    *,
    axis: Axes = -1,
    radius: float | torch.Tensor = 1.0,
) -> torch.Tensor:
    """The increment after which every slice of param + increment has norm `radius`.

    A slice that would become zero keeps its increment. Source: nGPT, arXiv 2410.01131.

    Args:
      increment: what would be added to `param`, with the sign of descent.
      param: the same shape.
      axis, radius: see `to_sphere`.

    Returns, raises: as `to_sphere`.
    """
    check_radius("radius", radius)
    dtype = working_dtype(param.dtype)
    p, u = param.to(dtype), increment.to(dtype)
    moved = p + u
    length = _norm(moved, axis)
    new = moved * (rounded_multiplier(radius, p) / _or_one(length)) - p
    return torch.where(length == 0, u, new).to(param.dtype)


def project_to_tangent(
    update: torch.Tensor, param: torch.Tensor, *, axis: Axes = -1
) -> torch.Tensor:
    """What of an update does not point along its slice's weights: u - w^ <w^, u> with w^ = w / |w|.

    A slice of zeros keeps its update.

    Args:
      update: u, of any shape. param: w, the same shape.
      axis: see `to_sphere`.

    Returns:
      A new tensor in the dtype of `param`.
    """
    dtype = working_dtype(param.dtype)
    p = param.to(dtype)
    w = p / _or_one(_norm(p, axis))
    return _tangent(update.to(dtype), w, axis).to(param.dtype)


def _tangent(u: torch.Tensor, w: torch.Tensor, axis: Axes) -> torch.Tensor:
    """What of u is orthogonal to w, whose slices have norm 1 or 0.

    Subtracted twice: where u is nearly along w, the first pass leaves rounding errors along w that are
    no longer small beside the tangent.
    """
    for _ in range(2):
        u = u - w * (w * u).sum(dim=axis, keepdim=True)
    return u


def _norm(x: torch.Tensor, axis: Axes) -> torch.Tensor:
    """Written out, as `torch_ref.stages.norms` says why."""
    return x.square().sum(dim=axis, keepdim=True).sqrt()


def _or_one(norm: torch.Tensor) -> torch.Tensor:
    return norm.masked_fill(norm == 0, 1.0)
