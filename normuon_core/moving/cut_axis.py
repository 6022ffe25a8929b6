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
      index: in the arrays' shapes. sizes: of the parts.
      before, behind: how many entries have the names that share the axis, on either side of the one that
        is cut.
    """

    index: int
    before: int
    sizes: tuple[int, ...]
    behind: int

    @classmethod
    def of(cls, cut: Cut, lengths: Mapping[str, int]) -> "CutAxis":
        """Where the names of the fused side have these lengths."""
        index = next(index for index, group in enumerate(cut.side) if cut.axis in group)
        group = cut.side[index]
        place = group.index(cut.axis)
        before, behind = (
            math.prod(lengths[name] for name in names)
            for names in (group[:place], group[place + 1 :])
        )
        return cls(index, before, cut.sizes, behind)

    def arrangements(self, length: int) -> Iterator[tuple[int, tuple[int, ...], int]]:
        """What `length` entries may be: (before, of each part, behind).

        All of the parameter; of a statistic also one for each part, or several in the ratio of the sizes
        where the parts are split further.
        """
        yield self.before, self.sizes, self.behind
        yield 1, (1,) * len(self.sizes), 1
        along, total = length // self.before, sum(self.sizes)
        yield self.before, tuple(along * size // total for size in self.sizes), 1

    def cut(self, array: np.ndarray) -> list[np.ndarray] | None:
        """The parts of an array; None where the array has no entries of its own for each part."""
        start, length, rest = self._around(array)
        for before, counts, behind in self.arrangements(length):
            if before * sum(counts) * behind == length:
                apart = array.reshape(*start, before, sum(counts), behind, *rest)
                stops = [*itertools.accumulate(counts[:-1])]
                pieces = np.split(apart, stops, axis=self.index + 1)
                return [
                    piece.reshape(*start, before * count * behind, *rest)
                    for piece, count in zip(pieces, counts, strict=True)
                ]
        return None

    def joined(self, pieces: Sequence[np.ndarray]) -> np.ndarray | None:
        """The inverse of `cut`; None where the pieces do not fit side by side."""
        start, _, rest = self._around(pieces[0])
        if any(self._around(piece)[::2] != (start, rest) for piece in pieces):
            return None
        lengths = [piece.shape[self.index] for piece in pieces]
        for before, counts, behind in self.arrangements(sum(lengths)):
            if [before * count * behind for count in counts] == lengths:
                apart = [
                    piece.reshape(*start, before, count, behind, *rest)
                    for piece, count in zip(pieces, counts, strict=True)
                ]
                return np.concatenate(apart, axis=self.index + 1).reshape(
                    *start, sum(lengths), *rest
                )
        return None

    def _around(self, array: np.ndarray) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        shape = array.shape
        return shape[: self.index], shape[self.index], shape[self.index + 1 :]
