"""After stage 2: every matrix gets the norm that an exact polar factor has."""

import torch

from normuon_core import NormSetting
from torch_ref.leaves.dtypes import working_dtype
from torch_ref.stages.norms import frobenius_norm


def set_norm(v: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """Gives every matrix the Frobenius norm that an exact polar factor of its shape has.

    To be used after `polar_factor`: v sqrt(min(rows, columns)) / max(|v|_F, eps).

    Source: Muon+, arXiv 2602.21545; nanochat.

    Args:
      v: (..., rows, columns) in any floating dtype, not modified.
      eps: a floor of the norm, below which a matrix is not lifted. A zero matrix stays zero.

    Returns:
      A tensor like v, rounded once from the working dtype.

    Raises:
      ValueError: a negative `eps`.
    """
    NormSetting(eps)
    lifted = v.to(working_dtype(v.dtype))
    factor = min(v.shape[-2:]) ** 0.5 / frobenius_norm(lifted).clamp_min(eps)
    return (lifted * factor).to(v.dtype)
