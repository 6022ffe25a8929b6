"""A stack of matrices, and what a stage on matrices is."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from normuon_core.cost import Form
from normuon_core.placement import Placement, Spread, whole_or_owned
from optax_normuon.leaves.arrays import Matrices
from optax_normuon.mesh.shards import Shards

State = TypeVar("State")
"""What a stage keeps: a tree of arrays."""


class Prepared(NamedTuple):
    """Says that a stack is normalised already, in the compute dtype, and what the iteration is to do.

    Attributes:
      form: of the iteration.
      by_kernels: whether the kernels make its products.
    """

    form: Form
    by_kernels: bool


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MatrixStack:
    """What a stage on matrices gets and returns.

    Attributes:
      values: (batch, rows, columns), each entry of the batch a matrix, or one device's part of it.
      output_axis: -2 where the rows are the output neurons, -1 where the columns are.
      shards: how the parts make up whole matrices; None where `values` has them whole.
      prepared: what `MatrixStage.prepare` has done; None for values as they come.
      placement: where the plan has them orthogonalized, and in which form; None outside of a plan.
    """

    values: Matrices
    output_axis: int = field(metadata={"static": True})
    shards: Shards | None = field(default=None, metadata={"static": True})
    prepared: Prepared | None = field(default=None, metadata={"static": True})
    placement: Placement | None = field(default=None, metadata={"static": True})

    @property
    def sides(self) -> tuple[int, int]:
        """(rows, columns) of a whole matrix."""
        if self.shards is not None:
            return self.shards.rows, self.shards.columns
        _, rows, columns = self.values.shape
        return rows, columns

    def sum_over(self, x: jax.Array, sides: tuple[int, ...]) -> jax.Array:
        """The sum of an array over sides of the whole matrices, whichever devices have their parts.

        Args:
          x: (..., rows or 1, columns or 1), of the parts in this stack.
          sides: -2 for the rows, -1 for the columns. They become 1 in the result.
        """
        total = jnp.sum(x, axis=sides, keepdims=True)
        return total if self.shards is None else self.shards.total(total, sides)

    def with_values(self, values: Matrices, *, prepared: Prepared | None = None) -> "MatrixStack":
        """The same stack with what a stage has made of its values."""
        return replace(self, values=values, prepared=prepared)


def with_an_owner(spread: Spread, may_stay: bool = False) -> Placement:
    """The placement for stages of unknown cost that need whole matrices."""
    del may_stay
    return whole_or_owned(spread, 0.0, 4)


def where_it_lies(spread: Spread, may_stay: bool) -> Placement:
    """The placement for a stage by itself that needs nothing of other devices but sums over shards."""
    if spread.parts == 1 or not may_stay:
        return with_an_owner(spread)
    return Placement("shards", 1, spread.count, 0, 0.0, 0.0)


class MatrixStage(NamedTuple, Generic[State]):
    """What `optax.GradientTransformation` is for trees, but for a `MatrixStack`.

    Attributes:
      init: the state of a stack: a tree of arrays (batch, rows or 1, columns or 1), all zero.
      update: (stack, state) to both anew.
      prepare: does on parts of matrices what `update` would do first, so that fewer bytes are sent to
        the owners of whole matrices.
      place: where on a mesh the stage wants a group of matrices. It is told whether they may stay
        divided, and may answer "shards" only then.
      takes_shards: whether `update` works on parts of matrices, with `MatrixStack.sum_over` for every
        sum and `MatrixStack.sides` for every size. A stage that does not say so is never given parts,
        neither alone nor behind a stage that takes them.
    """

    init: Callable[[MatrixStack], State]
    update: Callable[[MatrixStack, State], tuple[MatrixStack, State]]
    prepare: Callable[[MatrixStack], MatrixStack] = lambda stack: stack
    place: Callable[[Spread, bool], Placement] = with_an_owner
    takes_shards: bool = False


def abstract_state(
    stage: MatrixStage[State], shape: tuple[int, int, int], dtype: DTypeLike, output_axis: int
) -> State:
    """A stage's state for a stack of this shape, as `jax.ShapeDtypeStruct`s."""
    values = jax.ShapeDtypeStruct(shape, dtype)
    return jax.eval_shape(lambda values: stage.init(MatrixStack(values, output_axis)), values)


def chain_stages(first: MatrixStage, *others: MatrixStage) -> MatrixStage[tuple[Any, ...]]:
    """The stages one after the other, as one stage.

    Its state is the tuple of theirs. The first stage alone prepares and chooses the place.
    """
    stages = (first, *others)

    def init(stack: MatrixStack) -> tuple[Any, ...]:
        return tuple(stage.init(stack) for stage in stages)

    def update(stack: MatrixStack, states: tuple[Any, ...]) -> tuple[MatrixStack, tuple[Any, ...]]:
        new_states = []
        for stage, state in zip(stages, states, strict=True):
            stack, state = stage.update(stack, state)
            new_states.append(state)
        return stack, tuple(new_states)

    takes_shards = all(stage.takes_shards for stage in stages)
    return MatrixStage(init, update, first.prepare, first.place, takes_shards)
