"""A stack of matrices, and what a stage on matrices is."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normuon_core.cost import Form
from normuon_core.placement import Placement, Spread, whole_or_owned
from optax_normuon.mesh.shards import Shards


class Fed(NamedTuple):
    """What a stage before has done: values are normalised for this form of the iteration, in its compute
    dtype."""

    form: Form
    by_kernels: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MatrixStack:
    """What a stage on matrices gets and returns.

    Attributes:
      values: (batch, rows, columns), every batch entry a matrix, or one device's part of it.
      output_axis: -2 where the rows are the output neurons, -1 where the columns are.
      shards: how the parts make up whole matrices; None where `values` has them whole.
      fed: None for momentum as it comes.
      placement: where the plan has them orthogonalized, and in which form; None outside of a plan.
    """

    values: Any
    output_axis: int = field(metadata={"static": True})
    shards: Shards | None = field(default=None, metadata={"static": True})
    fed: Fed | None = field(default=None, metadata={"static": True})
    placement: Placement | None = field(default=None, metadata={"static": True})

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, columns) of a whole matrix."""
        if self.shards is not None:
            return self.shards.rows, self.shards.columns
        _, rows, columns = self.values.shape
        return rows, columns

    def sum_over(self, x, sides: tuple[int, ...]):
        """The sum of x, (..., rows or 1, columns or 1), over sides of the whole matrices; they become 1.

        Args:
          sides: -2 for the rows, -1 for the columns.
        """
        total = jnp.sum(x, axis=sides, keepdims=True)
        return total if self.shards is None else self.shards.total(total, sides)

    def with_values(self, values, *, fed: Fed | None = None) -> "MatrixStack":
        """The same matrices further on their way."""
        return replace(self, values=values, fed=fed)


def with_an_owner(spread: Spread, may_stay: bool = False) -> Placement:
    """For stages of unknown cost that need whole matrices."""
    del may_stay
    return whole_or_owned(spread, 0.0, 4)


class MatrixStage(NamedTuple):
    """What `optax.GradientTransformation` is for trees, for a `MatrixStack`.

    Its state must start at zero and consist of arrays (batch, rows or 1, columns or 1).

    Attributes:
      feed: what `update` would do first, on shards, so that less has to be moved to whole matrices.
      place: where on a mesh the stage wants a group of matrices. It is told whether they may stay
        divided, and may answer "shards" only then.
      takes_shards: whether `update` works on parts of matrices, with `MatrixStack.sum_over` for every
        sum and `MatrixStack.sides` for every size. A stage that does not say so never sees any: not
        alone, and not behind a stage that does.
    """

    init: Callable[[MatrixStack], Any]
    update: Callable[[MatrixStack, Any], tuple[MatrixStack, Any]]
    feed: Callable[[MatrixStack], MatrixStack] = lambda stack: stack
    place: Callable[[Spread, bool], Placement] = with_an_owner
    takes_shards: bool = False


def chain_stages(first: MatrixStage, *others: MatrixStage) -> MatrixStage:
    """The stages one after the other; the state is the tuple of theirs. The first chooses the place."""
    stages = (first, *others)

    def init(stack):
        return tuple(stage.init(stack) for stage in stages)

    def update(stack, states):
        new_states = []
        for stage, state in zip(stages, states, strict=True):
            stack, state = stage.update(stack, state)
            new_states.append(state)
        return stack, tuple(new_states)

    takes_shards = all(stage.takes_shards for stage in stages)
    return MatrixStage(init, update, first.feed, first.place, takes_shards)
