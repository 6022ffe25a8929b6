"""Means with confidence intervals of differences that are paired by seed."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats


class Interval(NamedTuple):
    """A mean and half the width of its interval; the half is infinite of a single value."""

    mean: float
    half: float

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Student's interval of the mean: mean ± t(level, n - 1) s / sqrt(n).

    Of paired differences it is the paired t-test's: whatever a seed does to both arms cancels.
    """
    array = np.asarray(values, np.float64)
    count = len(array)
    if count < 2:
        return Interval(float(array.mean()), math.inf)
    quantile = float(scipy.stats.t.ppf(0.5 + level / 2, count - 1))
    return Interval(float(array.mean()), quantile * float(array.std(ddof=1)) / math.sqrt(count))
