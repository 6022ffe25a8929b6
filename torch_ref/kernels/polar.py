"""The polar factor by kernels, on stacks that come from anywhere."""

import torch

from normuon_core import MatrixLayout, Polar
from normuon_core.cost import Form
from normuon_core.fused_step import polar_factors_of_pieces
from normuon_core.kernels.geometry import block_geometries
from normuon_core.kernels.launches import Output
from normuon_core.kernels.pieces import Block, Leaf, Piece
from normuon_core.kernels.source import RATES
from torch_ref.kernels.launcher import describe_device, launch, on_device
from torch_ref.leaves.dtypes import dtype_name


def polar_factors(stack: torch.Tensor, polar: Polar, *, form: Form, dtype: str) -> torch.Tensor:
    """Stage 2 of a stack (count, rows, columns), in the compute dtype."""
    stack = stack.contiguous()
    view = MatrixLayout(reduction_axis=-1, output_axis=-2).on(tuple(stack.shape))
    rates = torch.zeros(1, RATES, device=stack.device)
    leaf = Leaf(stack, None, rates, rates, output_of(rates), output_of(rates))
    (geometry,) = block_geometries(view)
    with on_device(stack.device):
        v, _ = polar_factors_of_pieces(
            launch,
            describe_device(stack.device),
            [Piece(Block(leaf, geometry, len(stack), None, None, None), 0, len(stack))],
            polar,
            momentum=None,
            form=form,
            dtype=dtype,
        )
    v = v[..., : geometry.long]
    return v.mT if stack.shape[-2] > stack.shape[-1] else v


def output_of(array: torch.Tensor) -> Output:
    """Shape and dtype of a tensor, as a launch is told what it writes."""
    name = dtype_name(array.dtype)
    assert name is not None
    return Output(tuple(array.shape), name)
