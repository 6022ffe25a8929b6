"""Tensors through `normuon_core.fused_step`: the step of matrices by kernels.

All arithmetic of a step is in the kernels that JAX runs as well, in the same order; here weights are
laid out for them, and what comes back is added. Nothing waits for the GPU.
"""

from collections.abc import Sequence

import torch

from normuon_core.fused_step import Piece, step_stack
from torch_ref.kernels.launcher import describe_device, launch, on_device
from torch_ref.steps.laid_out import LaidOut, rates_of
from torch_ref.steps.plan import StepPlan
from torch_ref.steps.weight import MatrixWeight


def step_matrices_with_kernels(plan: StepPlan, weights: Sequence[MatrixWeight]) -> None:
    """One step of the weights that the plan has for the kernels.

    Args:
      weights: by their numbers in the plan.
    """
    rates: dict[tuple[int, torch.device], torch.Tensor] = {}
    laid_out: dict[int, LaidOut] = {}
    for number, layout in plan.layouts.items():
        weight = weights[number]
        shared = id(weight.group), weight.param.device
        # Only bias correction reads the step, which each weight counts for itself.
        if shared not in rates or weight.recipe.momentum.rule == "bias_corrected":
            rates[shared] = rates_of(weight)
        laid_out[number] = LaidOut(weight, layout, rates[shared])
    for stages, pieces in plan.triton:
        form, dtype = stages.form
        with on_device(stages.device):
            step_stack(
                launch,
                describe_device(stages.device),
                [
                    Piece(laid_out[number].blocks[block], start, stop - start)
                    for (number, block), start, stop in pieces
                ],
                stages.recipe,
                form=form,
                dtype=dtype,
            )
            for (number, _), start, stop in pieces:
                laid_out[number].receive(stop - start)
