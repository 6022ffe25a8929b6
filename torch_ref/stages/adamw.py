"""AdamW, for the parameters that are no matrices: embeddings, output heads, norms, biases."""

import torch

from torch_ref.leaves.dtypes import Scalar, bias_correction, rounded
from torch_ref.stages.weight_decay import add_cautious_weight_decay


def adamw(
    gradient: torch.Tensor,
    param: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    lr: Scalar,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: Scalar,
    nesterov: bool = False,
    eps_root: float = 0.0,
    cautious: bool = False,
    step: int | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One step of AdamW, in the order in which `optax.adamw` computes it.

    m <- b1 m + (1 - b1) g, n <- b2 n + (1 - b2) g^2, and
    delta = -lr (m_hat / (sqrt(n / (1 - b2^t) + eps_root) + eps) + weight_decay p), where m_hat is
    m / (1 - b1^t), or b1 m / (1 - b1^(t+1)) + (1 - b1) g / (1 - b1^t) with `nesterov` (NAdam). With
    `cautious` only the entries decay that the rest of the update pulls towards zero, or does not move.

    Args:
      gradient, param, exp_avg (m), exp_avg_sq (n): one shape, one working dtype, in which m alone may
        be narrower; none is modified.
      lr, weight_decay: numbers, or tensors without axes. step: t, counted from 1, an integer or an
        integer tensor without axes.

    Returns:
      (delta to add to the parameter, the new m, the new n), all in the working dtype.
    """
    dtype = gradient.dtype
    # 1 - b in double precision, as in Optax, where the betas are Python numbers.
    m = gradient * rounded(1 - b1, dtype) + exp_avg.to(dtype) * rounded(b1, dtype)
    n = gradient.square() * rounded(1 - b2, dtype) + exp_avg_sq * rounded(b2, dtype)
    if nesterov:
        ahead = m / bias_correction(b1, step + 1, dtype)
        now = gradient / bias_correction(b1, step, dtype)
        m_hat = ahead * rounded(b1, dtype) + now * rounded(1 - b1, dtype)
    else:
        m_hat = m / bias_correction(b1, step, dtype)
    n_hat = n / bias_correction(b2, step, dtype)
    update = m_hat / ((n_hat + eps_root).sqrt() + eps)
    update = add_cautious_weight_decay(update, param, weight_decay=weight_decay, cautious=cautious)
    return update * -rounded(lr, dtype), m, n
