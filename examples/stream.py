"""A long run of token ids, in memory or in files, of which a training batch is a few windows."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from examples.errors import BadInput


@dataclasses.dataclass(frozen=True)
class Stream:
    """Token ids in parts, arrays of one axis (memory maps too); a window lies within one of them."""

    parts: Sequence[np.ndarray]

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def random_windows(self, generator: np.random.Generator, count: int, size: int) -> np.ndarray:
        """(count, size), each at a place as likely as any other."""
        return self._windows(generator.integers(0, self._places(size).sum(), size=count), size)

    def spread_windows(self, count: int, size: int) -> np.ndarray:
        """(count, size), evenly spread from the first to the last."""
        places = np.linspace(0, self._places(size).sum() - 1, count).astype(np.int64)
        return self._windows(places, size)

    def _places(self, size: int) -> np.ndarray:
        """How many windows begin in each part.

        Raises:
          BadInput: none anywhere.
        """
        places = np.array([max(0, len(part) - size + 1) for part in self.parts])
        if not places.any():
            raise BadInput(
                f"the text has {len(self)} tokens and a window takes {size}: give more text or a"
                " shorter context."
            )
        return places

    def _windows(self, places: np.ndarray, size: int) -> np.ndarray:
        ends = np.cumsum(self._places(size))
        part = np.searchsorted(ends, places, side="right")
        starts = places - np.where(part > 0, ends[part - 1], 0)
        windows = [
            self.parts[i][start : start + size] for i, start in zip(part, starts, strict=True)
        ]
        return np.stack(windows)
