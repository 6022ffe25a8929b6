"""Tensors through `normuon_core.fused_step`: the step of matrices by kernels.

All arithmetic of a step is in the kernels that JAX runs as well, in the same order; here weights are
laid out for them, and what comes back is added. Nothing waits for the GPU.
"""

import weakref
from collections.abc import Iterator, Sequence

import torch

from normuon_core.fused_step import step_stack
from normuon_core.kernels.launches import Launcher
from normuon_core.kernels.pieces import Piece
from torch_ref.kernels.launcher import describe_device, launch, on_device
from torch_ref.kernels.rehearsal import is_worthwhile, rehearsal
from torch_ref.steps.laid_out import LaidOut, rates_of
from torch_ref.steps.plan import StepPlan
from torch_ref.steps.weight import MatrixWeight


def step_matrices_with_kernels(plan: StepPlan, weights: Sequence[MatrixWeight]) -> None:
    """One step of the weights that the plan has for the kernels.

    Args:
      weights: by their numbers in the plan.
    """
    if plan not in _COMPILED and all(is_worthwhile(stages.device) for stages, _ in plan.triton):
        with rehearsal() as compile_only:
            for _ in _launch_all(plan, weights, compile_only):
                pass
    _COMPILED.add(plan)
    for weight, matrices in _launch_all(plan, weights, launch):
        weight.receive(matrices)


_COMPILED: weakref.WeakSet[StepPlan] = weakref.WeakSet()
"""Plans whose kernels have been compiled, or will be as they are launched."""


def _launch_all(
    plan: StepPlan, weights: Sequence[MatrixWeight], launch: Launcher
) -> Iterator[tuple[LaidOut, int]]:
    """Hands out every launch of a step; yields each weight with the matrices that are done of it."""
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
                yield laid_out[number], stop - start
