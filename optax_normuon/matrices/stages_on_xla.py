"""Stages on matrices by XLA's operations: the engine that the plan asks, and a step of its stacks."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normuon_core.placement import Placement, Spread
from optax_normuon.leaves.arrays import Matrices, Statistics
from optax_normuon.matrices.plan import PlannedPiece, PlannedStack, StackKey
from optax_normuon.matrices.stack import MatrixStack, MatrixStage, abstract_state
from optax_normuon.matrices.views import (
    LeafStatistic,
    join_blocks,
    join_statistic,
    split_blocks,
    split_statistic,
)
from optax_normuon.matrices.waves import one_by_one_and_waves
from optax_normuon.mesh.leaf_on_mesh import LeafOnMesh
from optax_normuon.mesh.owners import Owners, Sides
from optax_normuon.mesh.shards import Shards
from optax_normuon.mesh.specs import Specs


class StagesOnXla(NamedTuple):
    """The engine that runs a stage on matrices by XLA's operations; see `plan.Engine`."""

    stage: MatrixStage

    @property
    def name(self) -> str:
        """As `describe` prints it."""
        return "xla"

    def stack_keys(self, leaf: LeafOnMesh, dtype: str) -> list[StackKey]:
        """By sides and orientation, as stored: a stage is told of a stack which side the outputs are."""
        sides = [leaf.view.block_stack_shape(run.size)[1:] for run in leaf.view.runs]
        return [
            StackKey(rows, columns, sharding, dtype, leaf.view.output_stack_axis)
            for (rows, columns), sharding in zip(sides, leaf.shardings, strict=True)
        ]

    def place(self, spread: Spread) -> Placement:
        """Where the stage wants them.

        Raises:
          ValueError: it wants parts of matrices without saying that it works on them.
        """
        placement = self.stage.place(spread, self.stage.takes_shards)
        if placement.strategy == "shards" and not self.stage.takes_shards:
            raise ValueError(
                "a stage on matrices placed them as shards without `takes_shards`, which says that it"
                " works on parts of matrices; place them with `with_an_owner`."
            )
        return placement

    def bytes_a_matrix(self, spread: Spread, placement: Placement) -> int:
        """The input, the iterate and two products, in the dtype of the input."""
        entries = spread.rows * spread.columns
        if placement.strategy == "shards":
            entries = entries // spread.parts + spread.short**2
        return 4 * entries * jnp.dtype(spread.dtype).itemsize


def step_stacks(
    inner: MatrixStage,
    stacks: list[PlannedStack[int]],
    on_mesh: Mapping[int, LeafOnMesh],
    leaves: Mapping[int, jax.Array],
    states: Sequence[Mapping[int, LeafStatistic]],
    specs: Specs | None,
) -> tuple[dict[int, jax.Array], list[dict[int, LeafStatistic]]]:
    """Runs `inner` on all stacks; on a mesh, on one device's parts of the leaves.

    Args:
      stacks: the plan.
      leaves: by number, in any shape that holds matrices.
      states: for each array of `inner`'s state the statistics of all leaves.

    Returns:
      Leaves and states, as they were given.
    """
    blocks = {i: split_blocks(leaf, on_mesh[i].local) for i, leaf in leaves.items()}
    state_blocks = [
        {i: split_statistic(kept, on_mesh[i].local) for i, kept in each.items()} for each in states
    ]
    stepped: list[PlannedStack[int]] = []
    outputs: list[list[jax.Array]] = []
    for wave in one_by_one_and_waves(stacks):
        values = [_gather(blocks, stack.pieces) for stack in wave]
        if outputs and len(stacks) > 1:
            # Unordered, the compiler may hold the working memory of all stacks at once.
            values, outputs[-1] = jax.lax.optimization_barrier((values, outputs[-1]))
        steps = []
        for stack, own in zip(wave, values, strict=True):
            gathered = [_gather(each, stack.pieces) for each in state_blocks]
            steps.append(_start(inner, stack, own, gathered, specs))
        if len(steps) > 1:
            there = jax.lax.optimization_barrier([step.values for step in steps])
            steps = [replace(step, values=x) for step, x in zip(steps, there, strict=True)]
        made = [_updated(inner, step) for step in steps]
        if len(steps) > 1:
            made = jax.lax.optimization_barrier(made)
        outputs += [_brought_back(step, own) for step, own in zip(steps, made, strict=True)]
        stepped += wave
    scattered = [_scatter(stepped, each) for each in zip(*outputs, strict=True)]
    new_leaves: dict[int, jax.Array] = {}
    new_states: list[dict[int, LeafStatistic]] = [{} for _ in states]
    for i, leaf in leaves.items():
        view = on_mesh[i].local
        values, *arrays = (each[i] for each in scattered)
        # Before they are joined: blocks of other shapes may have another compute dtype.
        values = [value.astype(leaf.dtype) for value in values]
        new_leaves[i] = join_blocks(values, view)
        for new, kept, own in zip(new_states, states, arrays, strict=True):
            new[i] = join_statistic(own, view, like=kept[i])
    return new_leaves, new_states


@dataclass(frozen=True)
class _Started:
    """A stack that is ready to be worked on, where the plan places it.

    Attributes:
      stack: its values aside.
      values: as they come, or prepared and with their owner.
      state: the stage's, where the values are. sides: which its arrays have.
      owners: how what is made comes back; None where nothing has moved.
    """

    stack: MatrixStack
    values: Matrices
    state: Any
    sides: Sequence[Sides]
    owners: Owners | None


def _start(
    inner: MatrixStage,
    planned: PlannedStack[int],
    values: Matrices,
    states: Sequence[Statistics],
    specs: Specs | None,
) -> _Started:
    """Brings a stack and its state to where it is worked on."""
    rows, columns, sharding, dtype, output_axis = planned.key
    assert isinstance(output_axis, int)
    template = abstract_state(inner, (1, rows, columns), dtype, output_axis)
    structure = jax.tree.structure(template)
    sides = [Sides(rows=s.shape[1] > 1, columns=s.shape[2] > 1) for s in jax.tree.leaves(template)]
    here = MatrixStack(values, output_axis, placement=planned.placement)
    if planned.placement.strategy == "whole" or specs is None or sharding is None:
        return _Started(here, values, structure.unflatten(states), sides, None)
    stay = planned.placement.strategy == "shards"
    here = replace(
        here, shards=Shards(rows, columns, sharding.row_axes, sharding.column_axes, stay)
    )
    if stay:
        here = inner.prepare(here)
        return _Started(here, here.values, structure.unflatten(states), sides, None)
    owners = Owners.of(sharding, specs, planned.deal)
    prepared = inner.prepare(replace(here, values=owners.replicas_share(values)))
    moved = [
        owners.statistic_to_owners(state, which) for state, which in zip(states, sides, strict=True)
    ]
    whole = replace(prepared, values=owners.to_owners(prepared.values), shards=None)
    return _Started(whole, whole.values, structure.unflatten(moved), sides, owners)


def _updated(inner: MatrixStage, step: _Started) -> list[jax.Array]:
    """What `inner` makes, where the values are: [values, *arrays of its state]."""

    def update(values: Matrices, state: Any) -> list[jax.Array]:
        output, state = inner.update(replace(step.stack, values=values), state)
        return [output.values, *jax.tree.leaves(state)]

    if step.owners is None:
        return update(step.values, step.state)
    return step.owners.on_own(update, step.values, step.state)


def _brought_back(step: _Started, made: list[jax.Array]) -> list[jax.Array]:
    """The same arrays, where the leaves lie."""
    if step.owners is None:
        return made
    values, *states = made
    sent = list(zip(states, step.sides, strict=True))
    return [step.owners.to_holders(values), *step.owners.statistics_to_holders(sent)]


def _gather(
    runs: Mapping[int, Sequence[jax.Array]], pieces: Sequence[PlannedPiece[int]]
) -> jax.Array:
    """A stack's matrices, or their statistics, from the runs of output blocks of all leaves."""
    arrays = [runs[piece.leaf][piece.run][piece.start : piece.stop] for piece in pieces]
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def _scatter(
    stacks: Sequence[PlannedStack[int]], arrays: Sequence[jax.Array]
) -> dict[int, list[jax.Array]]:
    """The inverse of `_gather` for all stacks: every leaf's runs, each (matrices, ...)."""
    parts: dict[tuple[int, int], list[jax.Array]] = defaultdict(list)
    for stack, array in zip(stacks, arrays, strict=True):
        start = 0
        for piece in stack.pieces:
            count = piece.stop - piece.start
            parts[piece.leaf, piece.run].append(array[start : start + count])
            start += count
    leaves: dict[int, list[jax.Array]] = defaultdict(list)
    for leaf, run in sorted(parts):
        own = parts[leaf, run]
        leaves[leaf].append(own[0] if len(own) == 1 else jnp.concatenate(own))
    return leaves
