"""One training of a study: an arm, its numbers, a seed and a length."""

import dataclasses
from collections.abc import Mapping


def written(value: float) -> str:
    """A number as the ledger has it; two trials are the same if their numbers are written alike."""
    return f"{value:.6g}"


@dataclasses.dataclass(frozen=True)
class Trial:
    """What decides a training.

    Attributes:
      values: the numbers that are tuned or swept, by name; what is not named is 0.
      evaluations: the length, in intervals between two evaluations.
    """

    arm: str
    values: Mapping[str, float]
    seed: int
    evaluations: int

    def value(self, name: str) -> float:
        return float(written(self.values.get(name, 0.0)))
