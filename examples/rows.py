"""Rows in a random order, epoch after epoch, as batches that depend on the step alone."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import grain
import numpy as np

from examples.errors import BadInput
from examples.packing import Row

HELD_OUT = 10  # every tenth row
Each = TypeVar("Each")


def split(rows: Sequence[Each]) -> tuple[list[Each], list[Each]]:
    """To train on, and to hold out: every tenth, and of fewer the last.

    Raises:
      BadInput: a single row.
    """
    if len(rows) < 2:
        raise BadInput("found one row, expected at least one to train on and one to hold out.")
    held_out = set(range(HELD_OUT - 1, len(rows), HELD_OUT)) or {len(rows) - 1}
    train = [row for i, row in enumerate(rows) if i not in held_out]
    return train, [rows[i] for i in sorted(held_out)]


def batches(rows: Sequence[Row], *, seed: int, batch: int) -> Callable[[int], Row]:
    """The batch of each step: every row once an epoch, each epoch in an order of its own.

    grain finds the batch of any step without those before it: the step is all that a checkpoint needs.
    """
    order = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(reseed_each_epoch=True)
    data = order.batch(batch)

    def batch_of(step: int) -> Row:
        rows = data[step]
        assert rows is not None  # no row is ever filtered out
        return rows

    return batch_of


def whole_batches(rows: Sequence[Row], *, batch: int) -> list[Row]:
    """All rows in their order; the last batch is filled with rows of no weight."""
    empty = {name: np.zeros_like(value) for name, value in rows[0].items()}
    filled = [*rows, *[empty] * (-len(rows) % batch)]
    return [
        {name: np.stack([row[name] for row in filled[start : start + batch]]) for name in empty}
        for start in range(0, len(filled), batch)
    ]
