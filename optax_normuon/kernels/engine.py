"""The engine that steps matrices by kernels, as the plan sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from normuon_core.cost import Iteration
from normuon_core.kernels.geometry import bytes_a_matrix
from normuon_core.neurons import neurons_on_rows
from normuon_core.placement import Placement, Spread, place
from normuon_core.recipes import Recipe
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.matrices.plan import StackKey, plan
from optax_normuon.mesh.leaf_on_mesh import LeafOnMesh
from optax_normuon.mesh.specs import Specs


@dataclass(frozen=True)
class Kernels:
    """What is the same for all matrices of a step by kernels.

    Attributes:
      recipe: its rules alone are used: its numbers may change from step to step, and travel in arrays.
      iteration: of stage 2.
      ceiling: bytes of a stack, see `stack_ceiling`.
      may_stay: whether the plan may leave matrices divided. No kernel steps those: `left_to_xla` plans
        with it to find them.
    """

    recipe: Recipe
    iteration: Iteration
    ceiling: int
    may_stay: bool = False

    @property
    def name(self) -> str:
        """As `describe` prints it."""
        return "kernels"

    def stack_keys(self, leaf: LeafOnMesh, dtype: str) -> list[StackKey]:
        """By the sides, the shorter one as rows: kernels read a matrix by either side and in any dtype.

        On a mesh an owner makes the statistics of a whole stack at once, so all matrices of a stack have
        their neurons on the same side.
        """
        axis = "output" if self.recipe.neuron_norm is None else self.recipe.neuron_norm.axis
        result = []
        for run, sharding in zip(leaf.view.runs, leaf.shardings, strict=True):
            _, rows, columns = leaf.view.block_stack_shape(run.size)
            tall = rows > columns
            on_short = None
            if sharding is not None:
                on_short = neurons_on_rows(axis, rows, columns, leaf.view.output_is_rows) != tall
                if tall:
                    sharding = sharding._replace(rows=sharding.columns, columns=sharding.rows)
            result.append(
                StackKey(min(rows, columns), max(rows, columns), sharding, "any", on_short)
            )
        return result

    def place(self, spread: Spread) -> Placement:
        """The cheapest place."""
        return place(spread, self.iteration, may_stay=self.may_stay)

    def bytes_a_matrix(self, spread: Spread, placement: Placement) -> int:
        """What one matrix of the stack that is worked on takes, on a mesh as on one device.

        What travels meanwhile is not counted: of the stack before and the stack behind it, the entries
        that are sent and received.
        """
        assert placement.dtype is not None
        return bytes_a_matrix((spread.rows, spread.columns), placement.dtype)


def left_to_xla(
    leaves: Mapping[KeyPath, LeafOnMesh],
    dtypes: Mapping[KeyPath, np.dtype],
    engine: Kernels,
    specs: Specs | None,
) -> set[KeyPath]:
    """The leaves that no kernel steps.

    These are the leaves whose matrices are best kept sharded, which takes collectives within the
    iteration, divided ones whose rows are to be equilibrated, and those that have to be resharded before
    their matrices can be moved, as a fused projection that the mesh divides through its blocks.
    """
    if specs is None:
        return set()
    stacks = plan(leaves, dtypes, replace(engine, may_stay=True), specs, ceiling=engine.ceiling)
    left = {"shards"} if engine.recipe.row_equilibration is None else {"shards", "owners"}
    divided = {
        piece.leaf for stack in stacks if stack.placement.strategy in left for piece in stack.pieces
    }
    resharded = {key for key, leaf in leaves.items() if leaf.axes != specs.leaves[key]}
    return divided | resharded
