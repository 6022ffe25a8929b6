"""The product of two matrices: every product of `torch_ref` outside of its kernels is this one."""

import torch

HALF = (torch.bfloat16, torch.float16)


def product(
    a: torch.Tensor,
    b: torch.Tensor,
    d: torch.Tensor | None = None,
    e: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    diagonal: float = 0.0,
) -> torch.Tensor:
    """alpha A B + beta D + gamma E + diagonal I, rounded once to the operands' dtype.

    Half-precision operands are multiplied exactly, accumulated in float32, and the epilogue
    finishes in float32. float32 and float64 operands stay in their dtype. The process-wide switches
    that let a backend do less must be off, as PyTorch has them by default for float32: with TF32
    (`torch.backends.cuda.matmul.allow_tf32`, `torch.set_float32_matmul_precision`) a float32
    product carries ten bits. `torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction`
    and its bfloat16 twin, on by default, let cuBLAS add the pieces of a split sum in half
    precision.

    Args:
      a: (batch, m, k). b: (batch, k, n), the same dtype; views such as a transpose are not copied.
      d, e: (batch, m, n), the same dtype, or None for no such term.
      alpha, beta, gamma, diagonal: scalars, in float32 (float64 for float64 operands) whatever the
        operands' dtype.

    Returns:
      (batch, m, n) in the operands' dtype.
    """
    half, plain = a.dtype in HALF, e is None and diagonal == 0.0
    if half and (a.device.type == "cpu" or not plain):
        result = _float32_product(a, b).mul_(alpha)
        for addend, factor in ((d, beta), (e, gamma)):
            if addend is not None:
                result.add_(addend.float().mul_(factor))
    elif d is None:
        # Scaling what `bmm` returns comes too late: without alpha a product may leave its dtype's range.
        result = torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0.0, alpha=alpha)
    else:
        result = torch.baddbmm(d, a, b, beta=beta, alpha=alpha)
        if e is not None:
            result.add_(e, alpha=gamma)
    if diagonal != 0.0:
        result.diagonal(dim1=-2, dim2=-1).add_(diagonal)
    return result.to(a.dtype)


def _float32_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    if a.device.type == "cpu":
        # In float32, since CPUs differ in their half-precision products: some flush subnormals to zero.
        return torch.bmm(a.float(), b.float())
    return torch.bmm(a, b, torch.float32)
