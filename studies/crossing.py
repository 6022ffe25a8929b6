"""How many steps a training takes to a loss."""

from collections.abc import Sequence

import numpy as np


def steps_to(curve: Sequence[float] | np.ndarray, loss: float, *, every: int) -> float | None:
    """Where a curve, straight between evaluations, first is at `loss`; None: nowhere.

    Args:
      curve: the loss after `every`, 2 `every`, ... steps.
    """
    values = np.asarray(curve, np.float64)
    below = np.flatnonzero(values <= loss)
    if not len(below):
        return None
    i = int(below[0])
    if i == 0:
        return float(every)  # there is nothing before it to interpolate from
    part = (values[i - 1] - loss) / (values[i - 1] - values[i])
    return every * (i + float(part))
