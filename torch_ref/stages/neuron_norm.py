"""Stage 3: NorMuon's second moment, one number a neuron."""

import torch

from normuon_core.neurons import NeuronAxis, neurons_on_rows
from normuon_core.recipes import EpsRule, NeuronNorm
from torch_ref.leaves.dtypes import Scalar, complement, working_dtype


def normalize_neurons(
    v: torch.Tensor,
    second_moment: torch.Tensor,
    *,
    beta2: Scalar = 0.95,
    axis: NeuronAxis = "output",
    eps: float = 1e-10,
    eps_rule: EpsRule = "max",
    rescale: EpsRule | None = "max",
    output_is_rows: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divides each neuron of v by the running root mean square of its entries; |v| stays as it was.

    q = mean(v^2) over a neuron, s <- s + (1 - beta2)(q - s), y = v t with t = 1 / sqrt(max(s,
    eps)), and v_hat = y |v| / max(|y|, eps). Neither norm needs another pass over the
    matrix: with n entries a neuron, |v|^2 = n sum q and |y|^2 = n sum q t^2.

    Source: NorMuon, arXiv 2510.05491.

    Args:
      v: (..., rows, columns), the orthogonalized update in its compute dtype, not modified.
      second_moment: s, of `statistic_shape`, in the working dtype, zero at first; not modified.
      beta2: the decay of s, which is not bias-corrected: a number, or an array that broadcasts to s.
      axis: which side's neurons have a statistic: "output", "input" or "longer" (a tie is output).
      eps, eps_rule: "max" as above; "add" is t = 1 / (sqrt(s) + eps).
      rescale: "max" as above; "add" is v_hat = y |v| / (|y| + eps); None leaves y as it is.
      output_is_rows: which side of the stored matrix the output neurons are.

    Raises:
      ValueError: an unknown rule or axis, or a number out of its range.

    Returns:
      (v_hat in the dtype of v, rounded once from the working dtype; the new s).
    """
    NeuronNorm(beta2, axis, eps, eps_rule, rescale)  # pyright: ignore[reportArgumentType]
    dtype = working_dtype(second_moment.dtype)
    rows, columns = v.shape[-2:]
    on_rows = neurons_on_rows(axis, rows, columns, output_is_rows)
    along = -1 if on_rows else -2
    size = v.shape[along]
    lifted = v.to(dtype)
    q = lifted.square().mean(dim=along, keepdim=True)
    s = second_moment + (q - second_moment) * complement(beta2, dtype)
    t = s.clamp_min(eps).rsqrt() if eps_rule == "max" else 1 / (s.sqrt() + eps)
    if rescale is not None:
        norm_v = (size * q.sum(dim=(-2, -1), keepdim=True)).sqrt()
        norm_y = (size * (q * t * t).sum(dim=(-2, -1), keepdim=True)).sqrt()
        t = t * (norm_v / (norm_y.clamp_min(eps) if rescale == "max" else norm_y + eps))
    return (lifted * t).to(v.dtype), s
