"""The engine that steps matrices by kernels, as the plan sees it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp

from normuon_core.cost import Iteration
from normuon_core.kernels.geometry import bytes_a_matrix
from normuon_core.neurons import neurons_on_rows
from normuon_core.placement import Placement, Spread, place
from normuon_core.recipes import Recipe
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.matrices.plan import Alike, plan
from optax_normuon.mesh.placed_leaf import PlacedLeaf
from optax_normuon.mesh.specs import Specs


@dataclass(frozen=True)
class Kernels:
    """What is the same for all matrices of a step by kernels.

    Attributes:
      recipe: its numbers are not used: they travel in arrays.
      iteration: of stage 2.
      ceiling: bytes of a stack, see `stack_ceiling`.
      may_stay: whether matrices may be planned to stay divided, which no kernel steps.
    """

    recipe: Recipe
    iteration: Iteration
    ceiling: int
    may_stay: bool = False

    @property
    def name(self) -> str:
        """As `describe` prints it."""
        return "kernels"

    def alike(self, leaf: PlacedLeaf, dtype: str) -> list[Alike]:
        """The sides, the shorter one as rows: kernels read a matrix by either side and in any dtype.

        On a mesh the owners make the statistics of a whole stack at once: its neurons are on one side.
        """
        axis = "output" if self.recipe.neuron_norm is None else self.recipe.neuron_norm.axis
        result = []
        for run, cut in zip(leaf.view.runs, leaf.cuts, strict=True):
            _, rows, columns = leaf.view.block_stack_shape(run.size)
            tall = rows > columns
            on_short = None
            if cut is not None:
                on_short = neurons_on_rows(axis, rows, columns, leaf.view.output_is_rows) != tall
                if tall:
                    cut = cut._replace(rows=cut.columns, columns=cut.rows)
            result.append(Alike(min(rows, columns), max(rows, columns), cut, "any", on_short))
        return result

    def place(self, spread: Spread) -> Placement:
        """The cheapest place."""
        return place(spread, self.iteration, may_stay=self.may_stay)

    def bytes_a_matrix(self, spread: Spread, placement: Placement) -> int:
        """Of a stack that is worked on and, with owners, of another one that travels meanwhile."""
        assert placement.dtype is not None
        whole = bytes_a_matrix((spread.rows, spread.columns), placement.dtype)
        if placement.strategy != "owners":
            return whole
        sent_and_received = 2 * spread.rows * spread.columns
        return whole + sent_and_received * jnp.dtype(placement.dtype).itemsize


def left_to_xla(
    leaves: Mapping[KeyPath, PlacedLeaf],
    dtypes: Mapping[KeyPath, Any],
    engine: Kernels,
    specs: Specs | None,
) -> set[KeyPath]:
    """The leaves that no kernel steps: too lonely to be moved, or fused and cut through their blocks."""
    if specs is None:
        return set()
    stacks = plan(leaves, dtypes, replace(engine, may_stay=True), specs, ceiling=engine.ceiling)
    lonely = {
        piece.leaf
        for stack in stacks
        if stack.placement.strategy == "shards"
        for piece in stack.pieces
    }
    cut_through = {key for key, leaf in leaves.items() if leaf.axes != specs.leaves[key]}
    return lonely | cut_through
