"""What a driver returns: one weight's way through a trace."""

from typing import NamedTuple

import numpy as np


class Trajectory(NamedTuple):
    """What became of one weight.

    Attributes:
      params: (T + 1, *shape). momentum: (*shape), after the last step.
      second_moment: by step from 1, flat, block by block and matrix by matrix; empty where the recipe
        has none.
    """

    params: np.ndarray
    momentum: np.ndarray
    second_moment: dict[int, np.ndarray]
