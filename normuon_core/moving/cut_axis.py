"""The stored axis along which a fused parameter's arrays are cut into those of its parts, and joined."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from normuon_core.moving.rule import Cut


class CutAxis(NamedTuple):
    """The stored axis that is cut.

    Attributes:
      index: in the arrays' shapes.
      before: how many entries the names have that share the axis and stand before the one that is cut.
      sizes: of the parts.
    """

    index: int
    before: int
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, cut: Cut, lengths: Mapping[str, int]) -> "CutAxis":
        """Where the names of the fused side have these lengths."""
        index = next(index for index, group in enumerate(cut.side) if cut.axis in group)
        group = cut.side[index]
        before = math.prod(lengths[name] for name in group[: group.index(cut.axis)])
        return cls(index, before, cut.sizes)

    def shares(self, length: int) -> Iterator[tuple[int, tuple[int, ...]]]:
        """What `length` entries may be: (before, how many entries of each part follow on one).

        A statistic may have one for each part. Otherwise they are in the ratio of the sizes: those of
        the parameter, or of blocks that the parts are split into further.
        """
        yield 1, (1,) * len(self.sizes)
        along, total = length // self.before, sum(self.sizes)
        yield self.before, tuple(along * size // total for size in self.sizes)

    def cut(self, array: np.ndarray) -> list[np.ndarray] | None:
        """The parts of an array; None where it has no entries of its own for each part."""
        start, length, rest = self._around(array)
        for before, counts in self.shares(length):
            if before * sum(counts) == length:
                apart = array.reshape(*start, before, sum(counts), *rest)
                stops = [*itertools.accumulate(counts[:-1])]
                pieces = np.split(apart, stops, axis=self.index + 1)
                return [
                    piece.reshape(*start, before * count, *rest)
                    for piece, count in zip(pieces, counts, strict=True)
                ]
        return None

    def joined(self, pieces: Sequence[np.ndarray]) -> np.ndarray | None:
        """The inverse of `cut`; None where the pieces do not fit side by side."""
        start, _, rest = self._around(pieces[0])
        if any(self._around(piece)[::2] != (start, rest) for piece in pieces):
            return None
        lengths = [piece.shape[self.index] for piece in pieces]
        for before, counts in self.shares(sum(lengths)):
            if [before * count for count in counts] == lengths:
                apart = [
                    piece.reshape(*start, before, count, *rest)
                    for piece, count in zip(pieces, counts, strict=True)
                ]
                whole = np.concatenate(apart, axis=self.index + 1)
                return whole.reshape(*start, sum(lengths), *rest)
        return None

    def _around(self, array: np.ndarray) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        shape = array.shape
        return shape[: self.index], shape[self.index], shape[self.index + 1 :]
