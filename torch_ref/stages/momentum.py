"""Stage 1: momentum, by one of three rules: each returns the update and the new buffer."""

import torch

from torch_ref.leaves.dtypes import Scalar, bias_correction, complement, rounded, working_dtype


def lerp_momentum(
    gradient: torch.Tensor, buffer: torch.Tensor, *, momentum: Scalar, nesterov: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Averages gradients exponentially, the momentum of most recipes.

    m <- m + (1 - mu)(g - m), and u = g + mu (m - g) with Nesterov, else u = m. The buffer starts at
    zero and is not bias-corrected. Source: KellerJordan/Muon 857d1ad.

    Args:
      gradient: any shape, any floating dtype; not modified.
      buffer: the same shape, any floating dtype; not modified.
      momentum: mu, a number or a tensor without axes.
      nesterov: whether to look one step ahead.

    Returns:
      (u, the new buffer), both in the gradient's working dtype. Where the buffer is stored
      narrower, u comes from the unrounded one, as in `optax.trace`.
    """
    dtype = working_dtype(gradient.dtype)
    g, m = gradient.to(dtype), buffer.to(dtype)
    m = m + (g - m) * complement(momentum, dtype)
    return (g + (m - g) * rounded(momentum, dtype) if nesterov else m), m


def heavy_ball_momentum(
    gradient: torch.Tensor, buffer: torch.Tensor, *, momentum: Scalar, nesterov: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums gradients with decaying weights, as `optax.trace` does.

    m <- mu m + g, and u = g + mu m with Nesterov, else u = m.

    Args, returns: as in `lerp_momentum`.
    """
    dtype = working_dtype(gradient.dtype)
    g, m = gradient.to(dtype), buffer.to(dtype)
    mu = rounded(momentum, dtype)
    m = g + m * mu
    return (g + m * mu if nesterov else m), m


def bias_corrected_momentum(
    gradient: torch.Tensor,
    buffer: torch.Tensor,
    *,
    momentum: Scalar,
    nesterov: bool,
    step: int | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Averages gradients as `lerp_momentum` does and corrects the bias, as `optax.contrib.muon` does.

    Each term of u is divided by the sum of the weights that its gradients have:
    u = mu m / (1 - mu^(t+1)) + (1 - mu) g / (1 - mu^t) with Nesterov, else u = m / (1 - mu^t).
    Under a schedule the powers are of the current mu. Source: optax.contrib.muon 0.2.8.

    Args:
      step: t, counted from 1, an integer or an integer tensor without axes. The others, and returns:
        as in `lerp_momentum`.
    """
    dtype = working_dtype(gradient.dtype)
    g, m = gradient.to(dtype), buffer.to(dtype)
    mu, one_minus_mu = rounded(momentum, dtype), complement(momentum, dtype)
    now = bias_correction(momentum, step, dtype)
    m = m + (g - m) * one_minus_mu
    if not nesterov:
        return m / now, m
    ahead = bias_correction(momentum, step + 1, dtype)
    return m * mu / ahead + g * one_minus_mu / now, m
