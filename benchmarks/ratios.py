"""One contestant's time over another's in the same race, round by round."""

import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from benchmarks.race import quartiles
from benchmarks.rows import Row


class Ratio(NamedTuple):
    """What to divide: the time of `over` by that of `under`."""

    name: str
    over: str
    under: str


@dataclass
class Measured:
    """The median of a ratio's rounds and their quartiles: a drift that both share is in neither."""

    what: str
    name: str
    median: float
    quartiles: tuple[float, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measured(ratios: Iterable[Ratio], rows: Sequence[Row]) -> Iterator[Measured]:
    """For every workload on which both have a time."""
    found = {(row.what, row.who): row.times for row in rows if row.milliseconds is not None}
    for what in dict.fromkeys(row.what for row in rows):
        for name, over, under in ratios:
            above, below = found.get((what, over)), found.get((what, under))
            if above and below:
                rounds = [a / b for a, b in zip(above, below, strict=True)]
                yield Measured(what, name, statistics.median(rounds), quartiles(rounds))
