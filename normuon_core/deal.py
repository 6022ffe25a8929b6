"""Which owners have a matrix of a stack more than the others, where a stack does not divide evenly.

An owner that lacks the last matrix has nothing to do while the others work on theirs. That is made use
of only by several stacks together: what one of them leaves idle, another fills.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Deal:
    """How one stack's matrices are dealt to its owners, who stand in a ring.

    From the owner `first` on, `larger` of them have `each` matrices, and the others one less. Matrices
    that follow each other in the stack go to one owner, or to the next.

    Attributes:
      count: matrices of the stack.
      owners: how many there are.
      first: the first of those that have `each`.
      leaves_out: whether an owner that lacks a matrix does less. Else it works on zeros in its place,
        which takes no branch.
    """

    count: int
    owners: int
    first: int = 0
    leaves_out: bool = False

    @property
    def each(self) -> int:
        """The most that one owner has."""
        return math.ceil(self.count / self.owners)

    @property
    def larger(self) -> int:
        """How many owners have so many."""
        return self.count - self.owners * (self.each - 1)

    @property
    def is_even(self) -> bool:
        return self.larger == self.owners

    def is_larger(self, owner):
        """Whether an owner is one of those that have `each`: of a number, or of an array of numbers."""
        return (owner - self.first) % self.owners < self.larger


def least_loaded(load: np.ndarray, larger: int) -> int:
    """The first of `larger` owners in a row, of a ring of them, whose busiest has the least to do.

    Among equals it is the row that has the least to do in all, and then the first.
    """
    ring = np.concatenate([load, load[: larger - 1]])
    rows = np.lib.stride_tricks.sliding_window_view(ring, larger)
    return int(np.lexsort((rows.sum(axis=1), rows.max(axis=1)))[0])


def deal_together(
    deals: Sequence[Deal],
    costs: Sequence[float],
    owner_of: Sequence[np.ndarray],
    *,
    devices: int,
) -> tuple[list[Deal], float]:
    """Deals stacks so that no device has much more to do than another.

    The longest matrices are dealt first, each stack to a row of owners that have the least to do so far.
    It depends on its arguments alone, so that all devices come to the same.

    Args:
      deals: of the stacks, from any first owner.
      costs: of one matrix of each stack, in any unit of time.
      owner_of: for each stack, the owner that every device is, (devices,).

    Returns:
      The deals, and the time of the busiest device.
    """
    load, dealt = np.zeros(devices), list(deals)
    for i in sorted(range(len(deals)), key=lambda i: -costs[i]):
        deal, owner = deals[i], owner_of[i]
        of_owner = np.zeros(deal.owners)
        np.maximum.at(of_owner, owner, load)
        first = least_loaded(of_owner, deal.larger)
        dealt[i] = Deal(deal.count, deal.owners, first, leaves_out=True)
        load += costs[i] * (deal.each - 1 + dealt[i].is_larger(owner))
    return dealt, float(load.max())
