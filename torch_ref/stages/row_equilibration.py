"""Before stage 2: every output neuron's row of u gets the same norm."""

import torch

from normuon_core import RowEquilibration
from normuon_core.polar_iteration import BEFORE_SQUARING


def equilibrate_rows(
    u: torch.Tensor, *, eps: float = 1e-6, output_is_rows: bool = True
) -> torch.Tensor:
    """Gives all output neurons of a matrix rows of one norm; the matrix's norm stays as it was.

    To be used before `polar_factor`. With r output neurons, row i is multiplied by (|u|_F / sqrt(r)) /
    max(|u_i|, eps).

    Source: MuonEq, arXiv 2603.28254; nanochat.

    Args:
      u: (..., rows, columns) in the working dtype, not modified.
      eps: a floor of a row's norm, absolute: rows below it are not lifted to the others' norm.
      output_is_rows: which side of the stored matrix the output neurons are.

    Raises:
      ValueError: a negative `eps`.
    """
    RowEquilibration(eps)
    return u * row_factors(row_squares(u, output_is_rows=output_is_rows), eps=eps)


def row_squares(u: torch.Tensor, *, output_is_rows: bool) -> torch.Tensor:
    """The squared norms that `row_factors` takes, (..., rows, 1) or (..., 1, columns).

    They are those of `BEFORE_SQUARING` u, and those of the parts of a row add up to that of the row.
    """
    return (u * BEFORE_SQUARING).square().sum(dim=-1 if output_is_rows else -2, keepdim=True)


def row_factors(squares: torch.Tensor, *, eps: float) -> torch.Tensor:
    """What multiplies each row, like `squares`, which are those of all rows of whole matrices."""
    rows = squares.shape[-1] * squares.shape[-2]
    norm = (squares.sum(dim=(-2, -1), keepdim=True) / rows).sqrt()
    return norm / squares.sqrt().clamp_min(eps * BEFORE_SQUARING)
