"""Tuning: rounds of equally many trials around the best so far, until the best lies inside.

Values lie on grids, one an axis. A round tries points near the best one that were not tried yet, nearest
first. The best is inside once each of its neighbours, one step up and one step down on every axis, was
tried and is worse: the grid then needs no further widening.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

Point = tuple[int, ...]
"""Steps from the start, an axis each."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """A grid: start * factor^i for whole numbers i.

    Attributes:
      floor: the lowest i, for an axis whose lowest value stands for "none"; its value is 0.
    """

    name: str
    start: float
    factor: float = 2.0
    floor: int | None = None

    def value(self, i: int) -> float:
        return 0.0 if i == self.floor else self.start * self.factor**i

    def has(self, i: int) -> bool:
        return self.floor is None or i >= self.floor


def values_at(axes: Sequence[Axis], point: Point) -> dict[str, float]:
    return {axis.name: axis.value(i) for axis, i in zip(axes, point, strict=True)}


def best(losses: Mapping[Point, float]) -> Point:
    """The point of the lowest loss; one that diverged (NaN) is worse than any other."""
    return min(losses, key=lambda point: _rank(losses[point]))


def is_inside(axes: Sequence[Axis], losses: Mapping[Point, float]) -> bool:
    """Whether every neighbour of the best was tried."""
    return all(near in losses for near in _neighbours(axes, best(losses)))


def next_round(axes: Sequence[Axis], losses: Mapping[Point, float], count: int) -> list[Point]:
    """As many points, not tried yet, nearest to the best first; the start is the first of all.

    Neighbours along the axes come before diagonals, and earlier axes before later ones.
    """
    center = best(losses) if losses else (0,) * len(axes)
    found: list[Point] = []
    for reach in itertools.count(0):
        for point in _at_distance(axes, center, reach):
            if point not in losses:
                found.append(point)
            if len(found) == count:
                return found
    raise AssertionError("a grid has no end")


def _neighbours(axes: Sequence[Axis], point: Point) -> list[Point]:
    return _at_distance(axes, point, 1)


def _at_distance(axes: Sequence[Axis], center: Point, reach: int) -> list[Point]:
    """Points whose offsets add up to `reach`; the more even the offsets, the earlier."""
    ranges = [range(-reach, reach + 1)] * len(axes)
    offsets = [o for o in itertools.product(*ranges) if sum(map(abs, o)) == reach]
    offsets.sort(key=lambda o: (max(map(abs, o), default=0), [-abs(i) for i in o], o))
    points = [tuple(c + i for c, i in zip(center, o, strict=True)) for o in offsets]
    return [p for p in points if all(a.has(i) for a, i in zip(axes, p, strict=True))]


def _rank(loss: float) -> float:
    return loss if math.isfinite(loss) else math.inf
