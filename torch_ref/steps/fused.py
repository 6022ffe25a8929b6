"""Tensors through `normuon_core.fused_step`: the step of matrices by kernels.

All arithmetic of a step is in the kernels that JAX runs as well, in the same order; here weights are
laid out for them, and what comes back is added. Nothing waits for the GPU.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

from normuon_core import Recipe
from normuon_core.cost import Iteration
from normuon_core.fused_step import Block, Piece, step_stack
from normuon_core.kernels.geometry import bytes_a_matrix
from normuon_core.placement import Spread, place
from normuon_core.stacks import plan_stacks
from torch_ref.kernels.launcher import describe_device, launch, on_device
from torch_ref.leaves.groups import kernel_iteration
from torch_ref.steps.laid_out import LaidOut, rates_of
from torch_ref.steps.weight import DEFAULT_STACK_BYTES, MatrixWeight


def step_matrices_with_kernels(weights: Iterable[MatrixWeight]) -> None:
    """One step of all weights, their matrices of one size in one stack, cut to its bound."""
    together: dict[tuple, list[LaidOut]] = defaultdict(list)
    rates: dict[int, torch.Tensor] = {}
    for weight in weights:
        group = weight.group
        if id(group) not in rates or weight.recipe.momentum.rule == "bias_corrected":
            rates[id(group)] = rates_of(weight)
        ceiling = group["max_stack_bytes"] or DEFAULT_STACK_BYTES
        key = (weight.recipe, weight.param.device, kernel_iteration(group), ceiling)
        together[key].append(LaidOut(weight, rates[id(group)]))
    for (recipe, device, iteration, ceiling), members in together.items():
        stacks: dict[tuple[int, int], list[tuple[LaidOut, Block]]] = defaultdict(list)
        for member in members:
            for block in member.blocks:
                stacks[block.geometry.short, block.geometry.long].append((member, block))
        with on_device(device):
            for blocks in stacks.values():
                _step_blocks(blocks, recipe, device, iteration, ceiling)


def _step_blocks(
    blocks: Sequence[tuple[LaidOut, Block]],
    recipe: Recipe,
    device: torch.device,
    iteration: Iteration,
    ceiling: int,
) -> None:
    short, long = blocks[0][1].geometry.whole
    sizes = [block.batch for _, block in blocks]
    placement = place(Spread(sum(sizes), short, long), iteration)
    assert placement.form is not None
    assert placement.dtype is not None
    each = bytes_a_matrix((short, long), placement.dtype)
    for cuts in plan_stacks(sizes, each, ceiling):
        step_stack(
            launch,
            describe_device(device),
            [Piece(blocks[i][1], start, stop - start) for i, start, stop in cuts],
            recipe,
            form=placement.form,
            dtype=placement.dtype,
        )
        for i, start, stop in cuts:
            blocks[i][0].receive(stop - start)
