"""Which owners have a matrix of a stack more than the others, where a stack does not divide evenly.

An owner that lacks the last matrix has nothing to do while the others work on theirs. That is made use
of only by several stacks together: what one of them leaves idle, another fills.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

LEAST_GAIN = 0.1
"""Part of a wave's work that the busiest device must be spared. For less, stacks that travel one while
another is worked on, and no branch, are the better."""


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


@dataclass(frozen=True, eq=False)
class Uneven:
    """A stack that its owners do not divide evenly.

    Attributes:
      deal: from any first owner.
      time: of one matrix, in any unit.
      bytes_waiting: what the matrices of an owner take while others are worked on.
      owner_of: the owner that every device is, (devices,).
      leaves: whose matrices it has.
    """

    deal: Deal
    time: float
    bytes_waiting: int
    owner_of: np.ndarray
    leaves: frozenset[Hashable] = frozenset()

    @property
    def longest(self) -> float:
        """The time of an owner that has as many matrices as any."""
        return self.deal.each * self.time


class Wave(NamedTuple):
    """Stacks that are under way together.

    Attributes:
      members: which stacks. deals: theirs. busiest: the time of the device that has most to do.
    """

    members: tuple[int, ...]
    deals: tuple[Deal, ...]
    busiest: float


def waves(stacks: Sequence[Uneven], *, devices: int, ceiling: int) -> list[Wave]:
    """The stacks that gain from being under way together; the others stay by themselves.

    No leaf is in two stacks of a wave: what is made of a leaf is finished stack by stack.

    Args:
      ceiling: bytes that a device's matrices of one wave may take while they wait.
    """
    groups: list[list[int]] = []
    for i in sorted(range(len(stacks)), key=lambda i: -stacks[i].longest):
        group = next((g for g in groups if _fits([stacks[j] for j in (*g, i)], ceiling)), None)
        if group is None:
            groups.append([i])
        else:
            group.append(i)
    found = []
    for group in groups:
        own = [stacks[i] for i in group]
        deals, busiest = deal_together(
            [each.deal for each in own],
            [each.time for each in own],
            [each.owner_of for each in own],
            devices=devices,
        )
        if busiest <= (1 - LEAST_GAIN) * sum(each.longest for each in own):
            found.append(Wave(tuple(group), tuple(deals), busiest))
    return found


def _fits(stacks: Sequence[Uneven], ceiling: int) -> bool:
    leaves = [leaf for stack in stacks for leaf in stack.leaves]
    waiting = sum(stack.bytes_waiting for stack in stacks)
    return len(leaves) == len(set(leaves)) and waiting <= ceiling
