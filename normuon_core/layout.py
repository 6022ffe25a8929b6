"""Which axes of a stored weight are the two sides of its matrices, in whichever framework it lives."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby, pairwise
from typing import NamedTuple

AxisOrAxes = int | tuple[int, ...]


@dataclass(frozen=True)
class MatrixLayout:
    """Says how one weight array holds its matrices.

    Axes that are named neither reduction nor output are batch axes: each of their entries is a matrix
    of its own (scanned layers, experts, heads). The order within a tuple is the order in which the
    axes are merged.

    Examples, for an (out, in) matrix of the mathematics: a Flax `Dense` kernel (in, out) is
    `MatrixLayout(0, 1)`, a `torch.nn.Linear` weight `MatrixLayout(1, 0)`, a Flax attention query
    kernel (d_model, heads, head_dim) is `MatrixLayout(0, (1, 2))`, or per head `MatrixLayout(0, 2)`.

    A fused projection (d_model, outputs) of H heads of size S:

    | its outputs are stored as | matrices | layout |
    | --- | --- | --- |
    | all q, all k, all v | three | `MatrixLayout(0, 1, output_splits=3)` |
    | the same, grouped queries | three | `MatrixLayout(0, 1, output_splits=(q, k, v))` |
    | the same | one a head | `MatrixLayout(0, 1, output_splits=3 * H)` |
    | q, k, v of each head in turn | three | `MatrixLayout(0, (1, 3), unfold=(1, (H, 3, S)))` |
    | the same | one a head | `MatrixLayout(0, 3, unfold=(1, (H, 3, S)))` |
    | n q, k, v of each group | three | `MatrixLayout(0, (2, 1, 3), (n * t, t, t), (1, (G, n + 2, S)))` |

    In the last one G groups have t = G * S outputs of one kind.

    Attributes:
      reduction_axis: the axis or axes summed over in the forward pass (fan-in).
      output_axis: the axis or axes of the output neurons (fan-out).
      output_splits: sizes of the blocks of a fused projection along the merged output axes, or how many
        blocks of one size there are; each block is orthogonalized, normalized and scaled as if it were a
        parameter of its own.
      unfold: (a stored axis, sizes): the array is taken as if that axis, not counted from the end, were
        reshaped to these sizes, and the other fields count axes after that. One of the sizes may be -1.
    """

    reduction_axis: AxisOrAxes
    output_axis: AxisOrAxes
    output_splits: int | tuple[int, ...] | None = None
    unfold: tuple[int, tuple[int, ...]] | None = None

    def __post_init__(self):
        # A layout read from a file may have lists, which no cache can be keyed by.
        for field in ("reduction_axis", "output_axis", "output_splits", "unfold"):
            object.__setattr__(self, field, _as_tuples(getattr(self, field)))

    def __repr__(self) -> str:
        splits = "" if self.output_splits is None else f", output_splits={self.output_splits}"
        unfold = "" if self.unfold is None else f", unfold={self.unfold}"
        axes = f"reduction_axis={self.reduction_axis}, output_axis={self.output_axis}"
        return f"MatrixLayout({axes}{splits}{unfold})"

    def on(self, shape: tuple[int, ...], name: str = "array") -> "MatrixView":
        """This layout on an array of `shape`; `name` is what an error calls the array.

        Raises:
          ValueError: an axis past the rank, an axis named twice, no axis on one side, splits that
            are not positive or do not sum to the output size, sizes to unfold an axis to that do not
            multiply to its own, or an unfolded axis on both sides.
        """
        stored = tuple(shape)
        shape, folded = _unfolded(self.unfold, stored, name)
        reduction = _positive(self.reduction_axis, shape, name, "reduction_axis")
        output = _positive(self.output_axis, shape, name, "output_axis")
        named = reduction + output
        if len(set(named)) != len(named):
            raise ValueError(
                f"{name}: the layout's reduction_axis={self.reduction_axis} and output_axis="
                f"{self.output_axis} overlap on shape {shape}; give every axis to one side only."
            )
        unfolded = set() if folded is None else set(range(folded[0], sum(folded)))
        if unfolded & set(reduction) and unfolded & set(output):
            raise ValueError(
                f"{name}: unfold={self.unfold} makes axes of both reduction_axis={self.reduction_axis}"
                f" and output_axis={self.output_axis} from one of shape {stored}; store the two sides"
                " on axes of their own."
            )
        view = MatrixView(
            shape=shape,
            batch_axes=tuple(axis for axis in range(len(shape)) if axis not in named),
            row_axes=min(reduction, output),
            column_axes=max(reduction, output),
            output_is_rows=output < reduction,
            output_sizes=(),
            folded=folded,
        )
        return replace(view, output_sizes=self._sizes(shape, output, name))

    def _sizes(self, shape: tuple[int, ...], output: tuple[int, ...], name: str) -> tuple[int, ...]:
        outputs, splits = math.prod(shape[axis] for axis in output), self.output_splits
        if splits is None:
            return (outputs,)
        if isinstance(splits, int):
            if splits <= 0 or outputs % splits:
                raise ValueError(
                    f"{name}: output_splits={splits} does not divide the {outputs} neurons that the"
                    f" output axes of shape {shape} hold; give a number of equal blocks, or a tuple"
                    " of their sizes."
                )
            return (outputs // splits,) * splits
        if any(size <= 0 for size in splits) or sum(splits) != outputs:
            raise ValueError(
                f"{name}: output_splits={splits} sum to {sum(splits)}, but the output axes of shape"
                f" {shape} hold {outputs} neurons; give positive sizes that sum to {outputs}."
            )
        return tuple(splits)


def _as_tuples(value):
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


def _unfolded(
    unfold: tuple[int, tuple[int, ...]] | None, stored: tuple[int, ...], name: str
) -> tuple[tuple[int, ...], tuple[int, int] | None]:
    """(the shape with an axis unfolded, (the first of the axes that it became, their number))."""
    if unfold is None:
        return stored, None
    axis, sizes = unfold
    if not 0 <= axis < len(stored):
        raise ValueError(
            f"{name}: unfold={unfold} on shape {stored}: there is no axis {axis}; use one from 0 to"
            f" {len(stored) - 1}."
        )
    known = math.prod(size for size in sizes if size != -1)
    free = sizes.count(-1)
    fits = known > 0 and (known == stored[axis] if free == 0 else stored[axis] % known == 0)
    if not fits or free > 1 or len(sizes) < 2 or min(sizes) < -1:
        raise ValueError(
            f"{name}: unfold={unfold} on shape {stored}: give two or more sizes that multiply to the"
            f" {stored[axis]} entries of axis {axis}, at most one of them -1."
        )
    sizes = tuple(stored[axis] // known if size == -1 else size for size in sizes)
    return stored[:axis] + sizes + stored[axis + 1 :], (axis, len(sizes))


def _positive(axes: AxisOrAxes, shape: tuple[int, ...], name: str, side: str) -> tuple[int, ...]:
    axes = (axes,) if isinstance(axes, int) else tuple(axes)
    rank = len(shape)
    if not axes:
        raise ValueError(
            f"{name}: the layout's {side} is empty; a matrix needs an axis on each side."
        )
    for axis in axes:
        if not -rank <= axis < rank:
            raise ValueError(
                f"{name}: the layout's {side}={axis} runs past the rank of shape {tuple(shape)};"
                f" use an axis from {-rank} to {rank - 1}."
            )
    return tuple(axis % rank for axis in axes)


class Run(NamedTuple):
    """Consecutive output blocks of one size; each entry of the batch has a matrix for each of them."""

    blocks: int
    size: int


@dataclass(frozen=True)
class MatrixView:
    """A layout resolved on one shape: the array as a stack (batch, rows, columns).

    The side that is stored first gives the rows, so that bringing an array to its stack moves no data
    wherever the two sides and the batch are stored in one piece.

    Attributes:
      shape: the array's own, once the layout has unfolded it.
      batch_axes, row_axes, column_axes: together every axis once, none negative.
      output_is_rows: whether the rows are the output neurons.
      output_sizes: the sizes of the output blocks; one entry where nothing is split.
      folded: (the first, how many) of the axes that are a single one in the stored array; None where the
        layout unfolds none.
      apart: whether every block is a run of its own, as in a part of a weight that divides blocks.
    """

    shape: tuple[int, ...]
    batch_axes: tuple[int, ...]
    row_axes: tuple[int, ...]
    column_axes: tuple[int, ...]
    output_is_rows: bool
    output_sizes: tuple[int, ...]
    folded: tuple[int, int] | None = None
    apart: bool = False

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The permutation of axes that brings batch, rows and columns together in that order."""
        return self.batch_axes + self.row_axes + self.column_axes

    @property
    def batch_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.batch_axes)

    @cached_property
    def stack_shape(self) -> tuple[int, int, int]:
        """(batch, rows, columns) of the whole array, splits apart."""
        sides = (self.batch_axes, self.row_axes, self.column_axes)
        batch, rows, columns = (math.prod(self.shape[axis] for axis in side) for side in sides)
        return batch, rows, columns

    @property
    def is_split(self) -> bool:
        return len(self.output_sizes) > 1

    @property
    def output_axes(self) -> tuple[int, ...]:
        return self.row_axes if self.output_is_rows else self.column_axes

    @property
    def input_axes(self) -> tuple[int, ...]:
        return self.column_axes if self.output_is_rows else self.row_axes

    @property
    def output_stack_axis(self) -> int:
        """The axis of the stack that holds the output neurons: -2 or -1."""
        return -2 if self.output_is_rows else -1

    @property
    def inputs(self) -> int:
        _, rows, columns = self.stack_shape
        return columns if self.output_is_rows else rows

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The output blocks, consecutive ones of one size together."""
        if self.apart:
            return tuple(Run(1, size) for size in self.output_sizes)
        return tuple(Run(len(list(same)), size) for size, same in groupby(self.output_sizes))

    def matrices(self, run: Run) -> int:
        """How many matrices the blocks of a run hold."""
        return self.stack_shape[0] * run.blocks

    def block_stack_shape(self, size: int) -> tuple[int, int, int]:
        """(batch, rows, columns) of the block with `size` output neurons."""
        batch, rows, columns = self.stack_shape
        return (batch, size, columns) if self.output_is_rows else (batch, rows, size)

    def run_widths(self, outputs: int) -> tuple[int, ...]:
        """How many entries a block of each run has in an array with `outputs` on its output side.

        The array has one entry for each output neuron, or one for each block.
        """
        if outputs == sum(self.output_sizes):
            return tuple(run.size for run in self.runs)
        return (1,) * len(self.runs)

    def joined_statistic(
        self, blocks: Sequence[tuple[int, int, int]]
    ) -> tuple[int, int, int] | None:
        """The shape of the blocks' statistics side by side, (batch, rows or 1, columns or 1).

        None where they do not fit: some blocks' belong to the outputs, and some to the inputs.

        Args:
          blocks: of each output block its statistic's shape.
        """
        outputs, inputs = (-2, -1) if self.output_is_rows else (-1, -2)
        widths = tuple(shape[outputs] for shape in blocks)
        beside = {shape[inputs] for shape in blocks}
        if len(beside) > 1 or widths not in (self.output_sizes, (1,) * len(blocks)):
            return None
        batch, rows, columns = blocks[0]
        return (batch, sum(widths), columns) if outputs == -2 else (batch, rows, sum(widths))

    @property
    def stacked(self) -> "MatrixView":
        """The view of the same matrices once they are a stack, (batch, rows, columns)."""
        return replace(
            self,
            shape=self.stack_shape,
            batch_axes=(0,),
            row_axes=(1,),
            column_axes=(2,),
            folded=None,
        )

    def stored_axis(self, axis: int) -> int:
        """The axis of the stored array that an axis of `shape` is, or is a part of."""
        if self.folded is None or axis < self.folded[0]:
            return axis
        first, count = self.folded
        return max(first, axis - count + 1)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.fold(self.shape)

    def fold(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """As it is stored: the shape of the array, or of a statistic of its rank."""
        if self.folded is None:
            return shape
        first, count = self.folded
        inner = math.prod(shape[first : first + count])
        return (*shape[:first], inner, *shape[first + count :])

    def unfolded(self, stored: tuple[int, ...]) -> tuple[int, ...]:
        """The inverse of `fold`.

        A statistic may have fewer entries than the unfolded axis: those of its batch axes, times those
        on the first axis of a side.
        """
        if self.folded is None:
            return tuple(stored)
        first, count = self.folded
        axes = range(first, first + count)
        inner = tuple(self.shape[axis] for axis in axes)
        if stored[first] != math.prod(inner):
            rest = stored[first]
            for axis in set(axes) & set(self.batch_axes):
                rest //= self.shape[axis]
            heads = [side[0] for side in (self.row_axes, self.column_axes)]
            inner = tuple(
                self.shape[axis] if axis in self.batch_axes else rest if axis in heads else 1
                for axis in axes
            )
        return (*stored[:first], *inner, *stored[first + 1 :])

    def strides(self) -> tuple[int, int, int] | None:
        """Elements from one matrix, row and column to the next, in an array stored row by row.

        None where the axes of one side do not lie in one piece.
        """
        element = [math.prod(self.shape[axis + 1 :]) for axis in range(len(self.shape))]
        result = []
        for side in (self.batch_axes, self.row_axes, self.column_axes):
            axes = [axis for axis in side if self.shape[axis] > 1]
            for outer, inner in pairwise(axes):
                if element[outer] != element[inner] * self.shape[inner]:
                    return None
            result.append(element[axes[-1]] if axes else math.prod(self.shape))
        batch, rows, columns = result
        return batch, rows, columns

    def statistic_shape(self, stack_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """The array's own rank for a statistic of `stack_shape`, axes ordered as `order` says.

        A side that the statistic reduces keeps ones; of a split array's output side, what is not one
        number for each neuron stands on the first of the output axes, with ones on the others.
        """
        _, rows, columns = stack_shape
        return (
            self.batch_shape
            + self._side_shape(self.row_axes, rows)
            + self._side_shape(self.column_axes, columns)
        )

    def _side_shape(self, axes: tuple[int, ...], size: int) -> tuple[int, ...]:
        own = tuple(self.shape[axis] for axis in axes)
        return own if math.prod(own) == size else (size,) + (1,) * (len(axes) - 1)
