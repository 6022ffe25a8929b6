"""The one place where matrices are multiplied."""

import torch

HALF = (torch.bfloat16, torch.float16)


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
) -> torch.Tensor:
    """alpha A B + beta D, rounded once to the operands' dtype.

    Half-precision operands are multiplied exactly, accumulated in float32, and the epilogue
    finishes in float32. float32 and float64 operands stay in their dtype. The process-wide switches
    that let a backend do less must be off, as PyTorch has them by default for float32: with TF32
    (`torch.backends.cuda.matmul.allow_tf32`, `torch.set_float32_matmul_precision`) a float32
    product carries ten bits. `torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction`
    and its bfloat16 twin, on by default, let cuBLAS add the pieces of a split sum in half
    precision.

    Args:
      a: (batch, m, k). b: (batch, k, n), the same dtype; views such as a transpose are not copied.
      d: (batch, m, n), the same dtype, or None for no second term.
      alpha, beta: scalars, in float32 (float64 for float64 operands) whatever the operands' dtype.

    Returns:
      (batch, m, n) in the operands' dtype.
    """
    if a.dtype in HALF and a.device.type == "cpu":
        # Lifted, because CPUs differ in their own half-precision products: some flush subnormals.
        result = torch.bmm(a.float(), b.float()).mul_(alpha)
        if d is not None:
            result.add_(d.float().mul_(beta))
        return result.to(a.dtype)
    if d is None:
        # Not bmm and then a scaling: alpha may be what keeps the result in the dtype's range.
        return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0.0, alpha=alpha)
    return torch.baddbmm(d, a, b, beta=beta, alpha=alpha)
