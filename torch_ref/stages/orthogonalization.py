"""Stage 2: the polar factor of a matrix, by odd polynomials in products of the matrix alone."""

import math
from collections.abc import Sequence
from typing import Literal

import torch

from normuon_core import Coefficients, Polar
from normuon_core.cost import Algorithm, Iteration
from normuon_core.polar_iteration import BEFORE_SQUARING, iterate, range_scales
from normuon_core.polynomials import POLAR_EXPRESS, cubic_steps, find_coefficients, with_steps
from normuon_core.recipes import EpsRule, Preconditioning
from torch_ref.kernels.backend import Backend, takes_kernels
from torch_ref.leaves.dtypes import dtype_name, working_dtype
from torch_ref.stages.norms import sum_of_squares
from torch_ref.stages.product import product


def polar_factor(
    x: torch.Tensor,
    *,
    coefficients: str | Coefficients = POLAR_EXPRESS,
    steps: int | None = None,
    norm_scale: float = 1.02,
    eps: float = 1e-17,
    eps_rule: EpsRule = "max",
    preconditioning: Preconditioning = "frobenius",
    compute_dtype: torch.dtype | None = None,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
) -> torch.Tensor:
    """Orthogonalizes matrices: approximates the factor U V^T of each x = U S V^T by polynomials.

    X = x / max(norm_scale |x|, eps), then for each (a, b, c): A = X X^T, X <- a X + (b A + c A^2) X,
    on the shorter side of X (X^T X for tall matrices). Norm and scaling are done in the working
    dtype, then X is cast once.

    The Gram form is equal in exact arithmetic and touches the long side only at its start, its
    restarts and its end: with p(x) = x h(x^2), it iterates R = X X^T <- h(R) R h(R) and Q <- Q
    h(R), and X <- Q X. In bfloat16 it loses the small singular directions; float16 keeps them.

    Args:
      x: (..., rows, columns), any floating dtype, not modified.
      coefficients: a name of `normuon_core.POLYNOMIALS`, or one (a, b, c) a step.
      steps: how many of them, see `normuon_core.polynomials.with_steps`; None is all.
      norm_scale, eps, eps_rule: how the norm is kept below 1; with `eps_rule="add"` the denominator
        is norm_scale |x| + eps. Norms from 1e-15 to 1e16 give the same factor; below the floor it
        fades to zero.
      preconditioning: "frobenius" goes on from there; "aol" divides each row of the shorter side by the
        root of its sum in |X X^T| first, and the set "aol" is made for it (Turbo-Muon, arXiv
        2512.04632). The kernels do not have it.
      compute_dtype: of the products; None is bfloat16, and float16 where the Gram form runs.
      algorithm: "standard", "gram", or "auto": the Gram form on CUDA devices where it takes fewer
        operations, unless `compute_dtype` is bfloat16 (`normuon_core.cost.Iteration`).
      backend: "triton" for the kernels that JAX runs too, "eager" for PyTorch's own products, or
        "auto": "triton" on CUDA devices that have it, for the dtypes it takes.

    Returns:
      (..., rows, columns) in the compute dtype. Zero for a zero matrix; NaN for one that holds a
      NaN or an infinity, or whose norm overflows the working dtype.

    Raises:
      ValueError: unknown coefficients or more steps than they have, an unknown `algorithm` or
        `backend`, or "triton" where the kernels cannot run.

    Sources: Keller Jordan's Muon; Polar Express, arXiv 2505.16932; Dao-AILab/gram-newton-schulz.
    """
    coefficients = find_coefficients(coefficients)
    if steps is not None:
        coefficients = with_steps(coefficients, steps)
    rows, columns = x.shape[-2:]
    stack = x.reshape(-1, rows, columns)
    polar = Polar(coefficients, norm_scale, eps, eps_rule, preconditioning)
    dtypes = [x.dtype] if compute_dtype is None else [x.dtype, compute_dtype]
    by_kernels = takes_kernels(backend, polar, x.device, dtypes)
    iteration = Iteration(
        len(coefficients),
        algorithm,
        dtype_name(compute_dtype),
        on_gpu=by_kernels or x.device.type == "cuda",
        symmetric=by_kernels,
        cubics=cubic_steps(coefficients),
    )
    form, chosen = iteration.form(rows, columns)
    if by_kernels:
        from torch_ref.kernels.polar import polar_factors

        return polar_factors(stack, polar, form=form, dtype=chosen).reshape(x.shape)
    stack = stack.to(working_dtype(x.dtype))
    stack = normalized(stack, scaled_squares(stack), polar, sides=(rows, columns), dtype=chosen)
    return polynomial(stack, polar, form=form).reshape(x.shape)


def scaled_squares(u: torch.Tensor) -> torch.Tensor:
    """The squared norm that `normalized` takes, (..., 1, 1): |`BEFORE_SQUARING` u|_F^2.

    Those of the parts of a matrix add up to that of the matrix.
    """
    return sum_of_squares(u * BEFORE_SQUARING)


def normalized(
    u: torch.Tensor, squares: torch.Tensor, polar: Polar, *, sides: tuple[int, int], dtype: str
) -> torch.Tensor:
    """Divides matrices by their norms and casts them to the compute dtype, for `polynomial`.

    The divisor is max(norm_scale |u|, eps), or norm_scale |u| + eps with `eps_rule="add"`; the result
    is multiplied by the first of its `range_scales`. Once the norm is known all this is elementwise, so
    that it can be done on any part of a matrix.

    Args:
      u: (batch, rows, columns) in the working dtype: whole matrices or parts of them.
      squares: `scaled_squares` of each whole matrix, (batch, 1, 1).
      sides: (rows, columns) of the whole matrices.
      dtype: the compute dtype, by its name.
    """
    norm = squares.sqrt() * polar.norm_scale
    eps = polar.eps * BEFORE_SQUARING
    denominator = norm.clamp_min(eps) if polar.eps_rule == "max" else norm + eps
    # Dividing by a norm that has overflowed would give zero, and nobody would notice.
    denominator = denominator.masked_fill(norm.isinf(), math.nan)
    scale, _ = range_scales(*sides, dtype)
    return (u * BEFORE_SQUARING / (denominator / scale)).to(getattr(torch, dtype))


def polynomial(x: torch.Tensor, polar: Polar, *, form: Literal["standard", "gram"]) -> torch.Tensor:
    """Runs the iteration on a stack of whole matrices that `normalized` has returned."""
    rows, columns = x.shape[-2:]
    return iterate(
        x,
        polar.coefficients,
        LibraryProducts(),
        algorithm=form,
        short=min(rows, columns),
        scales=range_scales(rows, columns, str(x.dtype).removeprefix("torch.")),
        precondition=aol if polar.preconditioning == "aol" else None,
    )


def aol(x: torch.Tensor, gram: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """AOL preconditioning of X and its Gram matrix A: diag(s) X and diag(s) A diag(s).

    s_i = 1 / sqrt(sum_j |A_ij|), and 1 for a row of zeros. By Gershgorin's theorem no eigenvalue of
    diag(s) A diag(s), which is similar to diag(s^2) A, is above 1.

    Args:
      x: (batch, rows, columns). gram: of its shorter side, times `scale`.
    """
    dtype = working_dtype(x.dtype)
    lifted = gram.to(dtype)
    sums = lifted.abs().sum(dim=-1, keepdim=True) / scale
    s = torch.where(sums > 0, sums, 1.0).rsqrt()
    # A NaN reaches all of its matrix by the products that follow.
    wide = x.shape[-2] <= x.shape[-1]
    scaled = x.to(dtype) * (s if wide else s.mT)
    return scaled.to(x.dtype), (lifted * s * s.mT).to(gram.dtype)


class LibraryProducts:
    """The products of the iteration by PyTorch's own operations. X may be tall."""

    def gram(self, x: torch.Tensor, *, alpha: float) -> torch.Tensor:
        wide = x.shape[-2] <= x.shape[-1]
        return product(x, x.mT, alpha=alpha) if wide else product(x.mT, x, alpha=alpha)

    def multiply(
        self,
        s: torch.Tensor,
        t: torch.Tensor,
        *,
        alpha: float,
        addends: Sequence[tuple[torch.Tensor, float]] = (),
        diagonal: float = 0.0,
    ) -> torch.Tensor:
        factors = dict(zip(("beta", "gamma"), (factor for _, factor in addends), strict=False))
        arrays = (array for array, _ in addends)
        return product(s, t, *arrays, alpha=alpha, diagonal=diagonal, **factors)

    def apply(
        self, s: torch.Tensor, x: torch.Tensor, *, alpha: float, addend: float = 0.0
    ) -> torch.Tensor:
        a, b = (s, x) if x.shape[-2] <= x.shape[-1] else (x, s)
        return product(a, b, x if addend else None, alpha=alpha, beta=addend)
