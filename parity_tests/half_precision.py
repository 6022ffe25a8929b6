"""The yardstick of tier T2: the plain bfloat16 standard form, as published PyTorch code computes it."""

import ml_dtypes
import numpy as np

from normuon_core import Polar


def plain_bfloat16_polar_factor(u: np.ndarray, polar: Polar) -> np.ndarray:
    """Every product and every sum rounded to bfloat16, products accumulated in float32.

    A = X @ X.mT; B = b * A + c * A @ A; X = a * X + B @ X, as in KellerJordan/modded-nanogpt.

    Args:
      u: (rows, columns), any floating dtype.
    """

    def rounded(x):
        return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)

    u = u.astype(np.float32)
    x = rounded(u / (np.linalg.norm(u) * np.float32(polar.norm_scale) + np.float32(polar.eps)))
    x = x if x.shape[0] <= x.shape[1] else x.T
    for a, b, c in polar.coefficients:
        gram = rounded(x @ x.T)
        z = rounded(rounded(b * gram) + rounded(c * rounded(gram @ gram)))
        x = rounded(rounded(a * x) + rounded(z @ x))
    return x if u.shape[0] <= u.shape[1] else x.T
