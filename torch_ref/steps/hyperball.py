"""The norms that a hyperball takes of matrices whose parts lie on several ranks.

A step has two after one another: first those of updates and weights, then those of where the weights
would be. So each of the two is one all-reduce, of two numbers a matrix and of one.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from normuon_core import MatrixView
from torch_ref.leaves.dtensor import local
from torch_ref.leaves.dtypes import working_dtype
from torch_ref.matrices.views import from_blocks, to_blocks
from torch_ref.mesh.rectangles import mesh_group, sharding_of
from torch_ref.mesh.sums import HeldMatrices, held_matrices, sums_over_ranks
from torch_ref.stages.hyperball import starting_radii_shape
from torch_ref.stages.norms import sum_of_squares
from torch_ref.steps.owners import StackOnRanks, WeightOnRanks
from torch_ref.steps.weight import MatrixWeight


class HyperballsOnRanks:
    """The weights of a step that end it by norms over ranks.

    Args:
      weights: this rank's part of each, and how the whole of it lies over the ranks of the group. Every
        rank has the same ones in the same order.
    """

    def __init__(
        self, weights: Sequence[tuple[MatrixWeight, WeightOnRanks]], group: dist.ProcessGroup
    ):
        self._group, rank = group, dist.get_rank(group)
        self._weights: dict[int, tuple[MatrixWeight, HeldMatrices]] = {}
        for number, (weight, on_ranks) in enumerate(weights):
            if weight.recipe.hyperball is not None and on_ranks.is_divided:
                weight.is_divided = True
                self._weights[number] = weight, held_matrices(on_ranks.view, on_ranks.regions, rank)
        # What has no update yet, of matrices anywhere: all ranks count alike.
        self._missing = {i: held.blocks * held.count for i, (_, held) in self._weights.items()}

    def finish(self, wave: Sequence[StackOnRanks]) -> None:
        """Ends the step of the weights whose last matrices were in these stacks."""
        for slot in (slot for stack in wave for slot in stack.slots):
            if slot.weight in self._missing:
                self._missing[slot.weight] -= slot.count
        complete = [number for number, count in self._missing.items() if count == 0]
        if complete:
            _finish([self._weights[number] for number in complete], self._group)
        for number in complete:
            del self._missing[number]


def _finish(weights: Sequence[tuple[MatrixWeight, HeldMatrices]], group: dist.ProcessGroup) -> None:
    held, device = [each for _, each in weights], weights[0][0].param.device
    # Of a weight of which nothing is here, no steps.
    steps = [weight.hyperball_steps for weight, _ in weights]

    def norms(squares: list[list[torch.Tensor]], numbers: int) -> list[list[torch.Tensor]]:
        sums = sums_over_ranks(held, squares, numbers=numbers, device=device, group=group)
        return [[total.sqrt() for total in own] for own in sums]

    squares = [
        [torch.cat([sum_of_squares(s.update), sum_of_squares(s.param)], dim=-1) for s in own]
        for own in steps
    ]
    before = [[each.split(1, dim=-1) for each in own] for own in norms(squares, 2)]
    targets = [
        [step.target(length) for step, (length, _) in zip(own, lengths, strict=True)]
        for own, lengths in zip(steps, before, strict=True)
    ]
    reached = norms([[sum_of_squares(target) for target in own] for own in targets], 1)
    for (weight, _), *of_blocks in zip(weights, steps, targets, before, reached, strict=True):
        increments = [
            step.increment(target, length=length, own=own, reached=there)
            for step, target, (length, own), there in zip(*of_blocks, strict=True)
        ]
        if increments:
            weight.add(increments)


def starting_radii_over_ranks(param: DTensor, view: MatrixView) -> DTensor:
    """`starting_radii` of a DTensor, which lie as its second moments do.

    Every rank of its mesh must call; one outside of it has nothing to do.
    """
    sharding, shard = sharding_of(param), local(param.detach())
    shape = starting_radii_shape(view)
    lies, dtype = sharding.of_moment(view, shape), working_dtype(param.dtype)
    if sharding.mesh.get_coordinate() is None:
        return lies.zeros(shape, dtype, param.device)
    group, order = mesh_group(sharding.mesh)
    regions = sharding.regions(view.stored_shape)
    held = held_matrices(view, tuple(regions[place] for place in order), dist.get_rank(group))
    part = sharding.part(view).local
    squares = [sum_of_squares(block) for block in to_blocks(shard.to(dtype), part)]
    (sums,) = sums_over_ranks([held], [squares], numbers=1, device=shard.device, group=group)
    return lies.wrap(from_blocks([total.sqrt() for total in sums], part), shape)
