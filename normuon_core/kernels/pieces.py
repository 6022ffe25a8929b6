"""What a step by kernels works on: weights, runs of their blocks, and pieces of these in a stack."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

from normuon_core.kernels import launches
from normuon_core.kernels.geometry import Geometry, Span
from normuon_core.kernels.launches import Output

Array = Any
"""A JAX array or a PyTorch tensor."""


@dataclass
class Leaf:
    """One weight during one step; its arrays are replaced as the step goes on.

    Attributes:
      gradient, parameter, momentum: of the weight's shape.
      adds: whether the step is added to the parameter, in its place.
      result: the update, or where it `adds` the new parameter; None until the first matrix is done.
      rates: (runs of the batch, `source.RATES`) float32.
      momentum_output, parameter_output: their shapes and dtypes; the result has the parameter's.
    """

    gradient: Array
    parameter: Array
    momentum: Array
    rates: Array
    momentum_output: Output
    parameter_output: Output
    adds: bool = False
    result: Array = None


@dataclass
class Block:
    """One run of output blocks of a weight.

    Attributes:
      batch: how many matrices it has; the blocks of a batch entry follow each other.
      second_moment: (batch, neurons) float32, replaced by the step; None without stage 3.
      scales, decays: (batch,) float32.
      new_moments: on a mesh, the second moments of the matrices done so far, in order.
    """

    leaf: Leaf
    geometry: Geometry
    batch: int
    second_moment: Array
    scales: Array
    decays: Array
    new_moments: list[Array] = field(default_factory=list)


class Piece(NamedTuple):
    """Consecutive matrices of one run of blocks."""

    block: Block
    start: int
    count: int


class Together(NamedTuple):
    """Pieces that one launch covers: alike in all but the weight, and side by side in the stack.

    Attributes:
      span: of the first of them; `count` is each one's.
    """

    pieces: tuple[Piece, ...]
    span: Span

    @property
    def first(self) -> Block:
        return self.pieces[0].block

    @property
    def leaves(self) -> tuple[Leaf, ...]:
        return tuple(piece.block.leaf for piece in self.pieces)

    @property
    def matrices(self) -> slice:
        """Their places in the stack."""
        start = self.span.stack_start
        return slice(start, start + len(self.pieces) * self.span.count)


def launched_together(pieces: Sequence[Piece]) -> list[Together]:
    """A stack's pieces by launches, of `launches.MOST_LEAVES` at the most and as even as can be."""
    result, start = [], 0
    for _, run in groupby(pieces, key=_what_a_launch_shares):
        alike = list(run)
        rounds = math.ceil(len(alike) / launches.MOST_LEAVES)
        size = math.ceil(len(alike) / rounds)
        for first in range(0, len(alike), size):
            own = tuple(alike[first : first + size])
            result.append(Together(own, Span(own[0].start, start, own[0].count)))
            start += len(own) * own[0].count
    return result


def _what_a_launch_shares(piece: Piece) -> tuple:
    block, leaf = piece.block, piece.block.leaf
    return (
        block.geometry,
        block.batch,
        piece.start,
        piece.count,
        id(leaf.rates),
        leaf.gradient.dtype,
        leaf.momentum_output,
        leaf.parameter_output,
        leaf.adds,
        leaf.result is None,
    )
