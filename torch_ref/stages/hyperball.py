"""The last stage of a recipe whose matrices keep their norms: a step on the hyperball."""

from dataclasses import dataclass

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
    return HyperballStep.of(update, param, lr=lr, radius=radius, lr_mul=lr_mul).alone()


@dataclass(frozen=True)
class HyperballStep:
    """The step of `to_hyperball`, apart from its norms: those of whole matrices, (..., 1, 1) each.

    So parts of matrices can make it too, whose squares several processes add up.

    Attributes:
      update, param: as there, or the same part of each.
      rate: lr lr_mul. radius: R. Both in the dtype of `param`.
    """

    update: torch.Tensor
    param: torch.Tensor
    rate: Scalar
    radius: float | torch.Tensor

    @classmethod
    def of(
        cls,
        update: torch.Tensor,
        param: torch.Tensor,
        *,
        lr: Scalar,
        radius: float | torch.Tensor,
        lr_mul: float | torch.Tensor,
    ) -> "HyperballStep":
        """From the arguments of `to_hyperball`."""
        rate = rounded(lr, param.dtype) * rounded_multiplier(lr_mul, update)
        return cls(update, param, rate, rounded_multiplier(radius, update))

    def alone(self) -> torch.Tensor:
        """The increment, where this process has the matrices whole."""
        length, own = frobenius_norm(self.update), frobenius_norm(self.param)
        target = self.target(length)
        return self.increment(target, length=length, own=own, reached=frobenius_norm(target))

    def target(self, length: torch.Tensor) -> torch.Tensor:
        """Where the matrices would be without the projection; `length` is the norm of the update."""
        return self.param - self.rate * self.radius * (self.update / _or_one(length))

    def increment(
        self,
        target: torch.Tensor,
        *,
        length: torch.Tensor,
        own: torch.Tensor,
        reached: torch.Tensor,
    ) -> torch.Tensor:
        """What is added to `param`; `own` is its norm, and `reached` that of the target."""
        still = (length == 0) | (own == 0) | (reached == 0)
        projected = target * (self.radius / _or_one(reached))
        return (projected - self.param).masked_fill(still, 0.0)


def starting_radii(param: torch.Tensor, view: MatrixView) -> torch.Tensor:
    """The norm of each matrix of a whole parameter, in its working dtype.

    It has the parameter's rank, with size 1 on the sides; the norms of several output blocks stand side
    by side on the output axis.
    """
    blocks = to_blocks(param.detach().to(working_dtype(param.dtype)), view)
    return from_blocks([frobenius_norm(block) for block in blocks], view)


def starting_radii_shape(view: MatrixView) -> tuple[int, ...]:
    """The shape of `starting_radii`."""
    return tuple(starting_radii(torch.empty(view.stored_shape, device="meta"), view).shape)


def _or_one(norm: torch.Tensor) -> torch.Tensor:
    return norm.masked_fill(norm == 0, 1.0)
