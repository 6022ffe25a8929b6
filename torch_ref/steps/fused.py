"""Tensors through `normuon_core.fused_step`: the step of matrices by kernels.

All arithmetic of a step is in the kernels that JAX runs as well, in the same order; here weights are
laid out for them, and what comes back is added. Nothing waits for the GPU.
"""

from collections.abc import Iterable

import torch

from normuon_core.fused_step import Block, Piece, step_stack
from torch_ref.kernels.engine import KernelStages
from torch_ref.kernels.launcher import describe_device, launch, on_device
from torch_ref.leaves.groups import kernel_iteration
from torch_ref.matrices.plan import plan
from torch_ref.steps.laid_out import LaidOut, rates_of
from torch_ref.steps.weight import DEFAULT_STACK_BYTES, MatrixWeight


def step_matrices_with_kernels(weights: Iterable[MatrixWeight]) -> None:
    """One step of all weights, their matrices of one size in one stack, cut to its bound."""
    rates: dict[int, torch.Tensor] = {}
    members: list[tuple[KernelStages, tuple[LaidOut, Block], int]] = []
    for weight in weights:
        group = weight.group
        if id(group) not in rates or weight.recipe.momentum.rule == "bias_corrected":
            rates[id(group)] = rates_of(weight)
        laid_out = LaidOut(weight, rates[id(group)])
        iteration = kernel_iteration(group)
        ceiling = group["max_stack_bytes"] or DEFAULT_STACK_BYTES
        for block in laid_out.blocks:
            sides = block.geometry.whole
            stages = KernelStages(weight.recipe, iteration, weight.param.device, *sides, ceiling)
            members.append((stages, (laid_out, block), block.batch))
    for stages, pieces in plan(members):
        form, dtype = stages.form
        with on_device(stages.device):
            step_stack(
                launch,
                describe_device(stages.device),
                [Piece(block, start, stop - start) for (_, block), start, stop in pieces],
                stages.recipe,
                form=form,
                dtype=dtype,
            )
            for (laid_out, _), start, stop in pieces:
                laid_out.receive(stop - start)
