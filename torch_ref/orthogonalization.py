"""Stage 2: the polar factor of a matrix, by odd polynomials in products of the matrix alone."""

import math
from typing import Literal, get_args

import torch

from normuon_core import POLYNOMIALS, Coefficients
from normuon_core.polynomials import (
    MAX_GRAM_AMPLIFICATION,
    gram_restarts_before,
    last_amplification,
)
from normuon_core.recipes import EpsRule
from torch_ref.dtypes import working_dtype
from torch_ref.norms import frobenius_norm
from torch_ref.product import product

Algorithm = Literal["standard", "gram", "auto"]


def polar_factor(
    x: torch.Tensor,
    *,
    coefficients: Coefficients = POLYNOMIALS["polar_express"],
    norm_scale: float = 1.02,
    eps: float = 1e-6,
    eps_rule: EpsRule = "add",
    compute_dtype: torch.dtype | None = None,
    algorithm: Algorithm = "auto",
) -> torch.Tensor:
    """The orthogonal factor U V^T of each matrix x = U S V^T, as far as the polynomials bring it.

    X = x / (norm_scale |x| + eps), then for each (a, b, c): A = X X^T, X <- a X + (b A + c A^2) X,
    on the shorter side of X (X^T X for tall matrices). Norm and scaling are done in the working
    dtype, then X is cast once.

    The Gram form is equal in exact arithmetic and touches the long side only at its start, its
    restarts and its end: with p(x) = x h(x^2), it iterates R = X X^T <- h(R) R h(R) and Q <- Q
    h(R), and X <- Q X. In bfloat16 it loses the small singular directions; float16 keeps them.

    Args:
      x: (..., rows, columns), any floating dtype, not modified.
      coefficients: one (a, b, c) a step.
      norm_scale, eps, eps_rule: how the norm is kept below 1; with `eps_rule="max"` the denominator
        is max(norm_scale |x|, eps).
      compute_dtype: of the products; None is bfloat16, and float16 where the Gram form runs.
      algorithm: "standard", "gram", or "auto": the Gram form on CUDA devices where it takes fewer
        operations, unless `compute_dtype` is bfloat16 or the polynomials amplify too much
        (`normuon_core.polynomials.MAX_GRAM_AMPLIFICATION`).

    Returns:
      (..., rows, columns) in the compute dtype. Zero for a zero matrix; NaN for one that holds a
      NaN or an infinity, or whose norm overflows the working dtype.

    Raises:
      ValueError: no coefficients, or an unknown `algorithm`.

    Sources: Keller Jordan's Muon; Polar Express, arXiv 2505.16932; Dao-AILab/gram-newton-schulz.
    """
    if not coefficients:
        raise ValueError("polar_factor needs at least one (a, b, c) triple in `coefficients`.")
    rows, columns = x.shape[-2:]
    algorithm, compute_dtype = choose_form(
        rows,
        columns,
        coefficients=coefficients,
        algorithm=algorithm,
        compute_dtype=compute_dtype,
        device=x.device,
    )
    stack = x.reshape(-1, rows, columns).to(working_dtype(x.dtype))
    norm = frobenius_norm(stack) * norm_scale
    denominator = norm.clamp_min(eps) if eps_rule == "max" else norm + eps
    # Dividing by an overflowed norm would hand on a silent zero.
    denominator = denominator.masked_fill(norm.isinf(), math.nan)
    x_scale, gram_scale = range_scales(rows, columns, compute_dtype)
    stack = (stack / (denominator / x_scale)).to(compute_dtype)
    form = _gram_form if algorithm == "gram" else _standard_form
    return form(stack, coefficients, x_scale, gram_scale).reshape(x.shape)


def check_algorithm(algorithm: str) -> None:
    """Raises a ValueError unless `algorithm` is one."""
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"unknown algorithm {algorithm!r}; use 'standard', 'gram' or 'auto'.")


def choose_form(
    rows: int,
    columns: int,
    *,
    coefficients: Coefficients,
    algorithm: Algorithm,
    compute_dtype: torch.dtype | None,
    device: torch.device,
) -> tuple[Literal["standard", "gram"], torch.dtype]:
    """What `algorithm="auto"` and `compute_dtype=None` stand for, on one matrix shape.

    Raises:
      ValueError: an unknown `algorithm`.
    """
    check_algorithm(algorithm)
    if algorithm == "auto":
        accurate = (
            compute_dtype != torch.bfloat16
            and last_amplification(coefficients) <= MAX_GRAM_AMPLIFICATION
        )
        saves = device.type == "cuda" and _gram_saves(rows, columns, len(coefficients))
        algorithm = "gram" if accurate and saves else "standard"
    if compute_dtype is None:
        compute_dtype = torch.float16 if algorithm == "gram" else torch.bfloat16
    return algorithm, compute_dtype


def _gram_saves(rows: int, columns: int, steps: int) -> bool:
    """Whether the Gram form takes fewer operations, in units of the short side cubed.

    Five steps, long side over short side = ratio: 8 ratio + 28 against 20 ratio + 10.
    """
    ratio = max(rows, columns) / min(rows, columns)
    restarts = sum(gram_restarts_before(step) for step in range(steps))
    carried = steps - 1 - restarts
    gram = 4 * ratio * (1 + restarts) + 2 * steps + 2 * carried + 4 * carried
    return gram < steps * (4 * ratio + 2)


def range_scales(rows: int, columns: int, compute_dtype: torch.dtype) -> tuple[float, float]:
    """The powers of two by which X and its Gram matrix are stored: 1 but in float16.

    A normalised matrix has entries near (rows columns)^-1/2 and a Gram matrix near 1 / short side
    on its diagonal; for large matrices that is at float16's smallest normal number. Scaled by the
    reciprocals they lie near 1, and the caps keep a matrix with one large entry below 65504. Powers
    of two change no bit of the significand, and the products undo them in their float32 epilogues.
    """
    if compute_dtype != torch.float16:
        return 1.0, 1.0
    x_exponent = min(math.floor(math.log2(rows * columns) / 2), 13)
    gram_exponent = min(math.floor(math.log2(min(rows, columns))), 12)
    return 2.0**x_exponent, 2.0**gram_exponent


def _standard_form(
    x: torch.Tensor, coefficients: Coefficients, x_scale: float, gram_scale: float
) -> torch.Tensor:
    last = len(coefficients) - 1
    for step, (a, b, c) in enumerate(coefficients):
        gram = _gram(x, alpha=gram_scale / x_scale**2)
        z = product(gram, gram, gram, alpha=c / gram_scale, beta=b)
        unscale = 1 / x_scale if step == last else 1.0
        x = _on_short_side(z, x, x, alpha=unscale / gram_scale, beta=a * unscale)
    return x


def _gram_form(
    x: torch.Tensor, coefficients: Coefficients, x_scale: float, gram_scale: float
) -> torch.Tensor:
    last = len(coefficients) - 1
    gram = _gram(x, alpha=gram_scale / x_scale**2)
    q = None
    for step, (a, b, c) in enumerate(coefficients):
        z = product(gram, gram, gram, alpha=c / gram_scale, beta=b)
        # h(R) = a I + Z is stored only as Q's first value: beside a, small entries round away.
        q = (
            _plus_diagonal(z, a, scale=1 / gram_scale)
            if q is None
            else product(q, z, q, alpha=1 / gram_scale, beta=a)
        )
        if step == last:
            break
        if gram_restarts_before(step + 1):
            x, q = _on_short_side(q, x), None
            gram = _gram(x, alpha=gram_scale / x_scale**2)
        else:
            half_way = product(gram, z, gram, alpha=1 / gram_scale, beta=a)
            gram = product(z, half_way, half_way, alpha=1 / gram_scale, beta=a)
    assert q is not None
    return _on_short_side(q, x, alpha=1 / x_scale)


def _gram(x: torch.Tensor, *, alpha: float) -> torch.Tensor:
    """alpha X X^T of a wide X, alpha X^T X of a tall one."""
    wide = x.shape[-2] <= x.shape[-1]
    return product(x, x.mT, alpha=alpha) if wide else product(x.mT, x, alpha=alpha)


def _on_short_side(
    square: torch.Tensor,
    x: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> torch.Tensor:
    """alpha S X + beta D for a wide X, alpha X S + beta D for a tall one."""
    wide = x.shape[-2] <= x.shape[-1]
    a, b = (square, x) if wide else (x, square)
    return product(a, b, d, alpha=alpha, beta=beta)


def _plus_diagonal(z: torch.Tensor, a: float, *, scale: float) -> torch.Tensor:
    result = z.to(working_dtype(z.dtype)) * scale
    result.diagonal(dim1=-2, dim2=-1).add_(a)
    return result.to(z.dtype)
