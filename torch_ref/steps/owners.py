"""Which rank orthogonalizes which matrix of the weights on one mesh, and what travels for that.

It is decided from shapes and placements alone, so that every rank makes the same plan, and is kept from
step to step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

from normuon_core import MatrixView
from torch_ref.leaves.part import Region, stack_indices
from torch_ref.matrices.plan import PlannedStack, plan
from torch_ref.mesh.exchange import Route, Tile, route, tiles, to_holders, to_owners
from torch_ref.stages.stack import StackStages


@dataclass(frozen=True)
class WeightOnRanks:
    """A weight over the ranks of a mesh.

    Attributes:
      view: of the whole weight.
      regions: what each rank holds of it.
      stages: what the matrices of each output block go through.
      moment_shapes, moment_regions: of the second moment, or of each block's; empty where there is none.
      needs_norm: whether the holders want the norm of each update, for the `rms` rule.
    """

    view: MatrixView
    regions: tuple[Region, ...]
    stages: tuple[StackStages, ...]
    moment_shapes: tuple[tuple[int, ...], ...]
    moment_regions: tuple[tuple[Region, ...], ...]
    needs_norm: bool

    def block_outputs(self, block: int) -> tuple[int, int]:
        """(first, one after the last) of a block's output neurons."""
        return list(pairwise([0, *accumulate(self.view.output_sizes)]))[block]

    def block_tiles(self, block: int) -> list[tuple[Tile, ...]]:
        """The tiles of a block's matrices, by their place in the batch."""
        return tiles(self.view, self.regions, self.block_outputs(block))

    def moment_tiles(self, block: int) -> list[tuple[Tile, ...]]:
        """The tiles of the block's second moment, each matrix's seen as one row (1, neurons)."""
        stages = self.stages[block]
        if stages.neuron_norm is None:
            return [()] * self.view.stack_shape[0]
        sizes = self.view.output_sizes
        widths = sizes if stages.neurons_are_rows == self.view.output_is_rows else (1,) * len(sizes)
        array, first = (0, sum(widths[:block])) if len(self.moment_shapes) == 1 else (block, 0)
        view = replace(self.view, shape=self.view.unfolded(self.moment_shapes[array]))
        found = tiles(view, self.moment_regions[array], (first, first + widths[block]))
        return [
            tuple(
                Tile((0,), t.rows if stages.neurons_are_rows else t.columns, t.holders)
                for t in each
            )
            for each in found
        ]

    @cached_property
    def is_divided(self) -> bool:
        """Whether parts of one matrix lie on several ranks, and are no replicas."""
        whole = (0, sum(self.view.output_sizes))
        return any(len(each) > 1 for each in tiles(self.view, self.regions, whole))

    @cached_property
    def is_whole_where_it_is(self) -> bool:
        """Whether each matrix is held by one rank, with all its blocks: nothing has to move.

        Only batch axes are divided then, and the second moments are as the weight is.
        """
        whole = (0, sum(self.view.output_sizes))
        return all(
            len(each) == 1 and len(each[0].holders) == 1
            for each in tiles(self.view, self.regions, whole)
        )


@dataclass(frozen=True)
class Slot:
    """Consecutive matrices of one output block of a weight, and their place in a stack.

    Attributes:
      weight, block: which. first: the number in the stack of the first of them.
      count: how many.
      here: which of the block's matrices this rank holds parts of, as its own stack counts them.
      numbers: their numbers in the stack.
      outputs: the output neurons of these matrices that this rank holds.
    """

    weight: int
    block: int
    first: int
    count: int
    here: slice
    numbers: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class StackOnRanks:
    """Matrices of one shape that go through the stages together, each on its owner.

    Attributes:
      stages: what they go through.
      slots: where they come from.
      owned: the numbers of this rank's own.
      counted: the matrices to whose norm this rank adds its part; of several replicas one does.
      is_divided: whether the norms are sums over ranks.
      matrices_to_owners, matrices_to_holders: the way of the matrices.
      statistics: the length of a row of statistics: one number for each neuron, and one for the norm of
        the update.
      statistics_to_owners, statistics_to_holders: the way of the second moments and of the norms.
    """

    stages: StackStages
    slots: tuple[Slot, ...]
    owned: tuple[int, ...]
    counted: frozenset[int]
    is_divided: bool
    matrices_to_owners: Route
    matrices_to_holders: Route
    statistics: int
    statistics_to_owners: Route
    statistics_to_holders: Route


class _Together(NamedTuple):
    """What matrices on a mesh must have in common to share a stack."""

    stages: StackStages
    needs_norm: bool

    @property
    def bytes_a_matrix(self) -> int:
        return self.stages.bytes_a_matrix

    @property
    def max_bytes(self) -> int:
        return self.stages.max_bytes


@lru_cache(maxsize=16)
def plan_on_ranks(
    weights: tuple[WeightOnRanks, ...], *, rank: int, ranks: int
) -> tuple[tuple[StackOnRanks, ...], ...]:
    """The stacks of a step of these weights in waves, seen by one of the ranks.

    All matrices of a wave come to their owners before any is worked on, and go back when all are done,
    so that a rank without a matrix of one stack works on another's meanwhile. A matrix whose rows and
    columns some ranks hold whole is done by one of these; any other by the rank that has the least to
    do so far in the wave, of those whose share of the stack is not full: a stack is cut to what its
    shares take in memory. The longest matrices are given away first.
    """
    members = [
        (_Together(stages, weight.needs_norm), (index, block), weight.view.stack_shape[0])
        for index, weight in enumerate(weights)
        for block, stages in enumerate(weight.stages)
    ]
    result = []
    for wave in _waves(plan(members, ranks=ranks), ranks):
        load = [0] * ranks
        own = []
        for (stages, needs_norm), pieces in wave:
            cut = [(*block, start, stop) for block, start, stop in pieces]
            own.append(_stack(weights, stages, needs_norm, cut, load, rank))
        result.append(tuple(own))
    return tuple(result)


_Planned = PlannedStack[_Together, tuple[int, int]]


def _waves(stacks: Sequence[_Planned], ranks: int) -> list[list[_Planned]]:
    """The stacks, those of the longest matrices first, as many together as a rank has memory for."""
    waves: list[list[_Planned]] = []
    for stack in sorted(stacks, key=lambda stack: -_work(stack.engine.stages)):
        wave = next((w for w in waves if _fits([*w, stack], ranks)), None)
        if wave is None:
            waves.append([stack])
        else:
            wave.append(stack)
    return waves


def _fits(stacks: Sequence[_Planned], ranks: int) -> bool:
    taken = sum(
        math.ceil(sum(stop - start for _, start, stop in stack.pieces) / ranks)
        * stack.engine.bytes_a_matrix
        for stack in stacks
    )
    return taken <= min(stack.engine.max_bytes for stack in stacks)


def _stack(
    weights: Sequence[WeightOnRanks],
    stages: StackStages,
    needs_norm: bool,
    pieces: Sequence[tuple[int, int, int, int]],
    load: list[int],
    rank: int,
) -> StackOnRanks:
    ranks = len(load)
    matrices: list[tuple[Tile, ...]] = []
    moments: list[tuple[Tile, ...]] = []
    slots = []
    for index, block, start, stop in pieces:
        weight, first = weights[index], len(matrices)
        matrices += weight.block_tiles(block)[start:stop]
        moments += weight.moment_tiles(block)[start:stop]
        batch, rows, columns = stack_indices(weight.view, weight.regions[rank])
        side = rows if weight.view.output_is_rows else columns
        low, high = weight.block_outputs(block)
        outputs = tuple(i - low for i in side if low <= i < high)
        here = [i for i, matrix in enumerate(batch) if start <= matrix < stop]
        bounds = slice(here[0], here[-1] + 1) if here else slice(0, 0)
        numbers = tuple(first + batch[i] - start for i in here)
        slots.append(Slot(index, block, first, stop - start, bounds, numbers, outputs))
    owners = _owners(matrices, stages, load)
    neurons = stages.neurons
    norms: list[tuple[Tile, ...]] = [()] * len(matrices)
    if needs_norm:
        norms = [
            (Tile((0,), (neurons,), tuple(sorted({h for t in each for h in t.holders}))),)
            for each in matrices
        ]
    back = [(*moment, *norm) for moment, norm in zip(moments, norms, strict=True)]
    return StackOnRanks(
        stages=stages,
        slots=tuple(slots),
        owned=tuple(i for i, owner in enumerate(owners) if owner == rank),
        counted=frozenset(
            i for i, each in enumerate(matrices) if any(t.holders[0] == rank for t in each)
        ),
        is_divided=any(len(each) > 1 for each in matrices),
        matrices_to_owners=route(to_owners(matrices, owners), rank=rank, ranks=ranks),
        matrices_to_holders=route(to_holders(matrices, owners), rank=rank, ranks=ranks),
        statistics=neurons + needs_norm,
        statistics_to_owners=route(to_owners(moments, owners), rank=rank, ranks=ranks),
        statistics_to_holders=route(to_holders(back, owners), rank=rank, ranks=ranks),
    )


def _owners(
    matrices: Sequence[tuple[Tile, ...]], stages: StackStages, load: list[int]
) -> list[int]:
    """The owner of each matrix of a stack; its work is added to the owner's load."""
    ranks = range(len(load))
    share = math.ceil(len(matrices) / len(load))
    owned = [0] * len(load)
    result = []
    for matrix in matrices:
        open_to = [rank for rank in ranks if owned[rank] < share]
        owner = min(matrix[0].holders if len(matrix) == 1 else open_to, key=load.__getitem__)
        owned[owner] += 1
        load[owner] += _work(stages)
        result.append(owner)
    return result


def _work(stages: StackStages) -> int:
    """The work on one matrix, in no unit."""
    return stages.rows * stages.columns * min(stages.sides)
