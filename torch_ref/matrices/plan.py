"""Matrices that are alike put into stacks, as many as fit into the memory that a stack may take.

This is one function for every way of a step: PyTorch's own operations (`stages.stack`), the kernels
(`kernels.engine`) and the ranks of a mesh (`steps.owners`).
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from typing import Generic, NamedTuple, Protocol, TypeVar

from normuon_core.stacks import plan_stacks


class Engine(Hashable, Protocol):
    """How matrices are stepped, and what they must have in common to be stepped together.

    Attributes:
      bytes_a_matrix: its estimate of the temporary memory that one matrix of a stack takes.
      max_bytes: what a stack may take, unless one matrix alone needs more.
    """

    @property
    def bytes_a_matrix(self) -> int: ...

    @property
    def max_bytes(self) -> int: ...


E = TypeVar("E", bound=Engine)
Run = TypeVar("Run")


class PlannedPiece(NamedTuple, Generic[Run]):
    """Matrices `start` to `stop` of one run of output blocks of a weight."""

    run: Run
    start: int
    stop: int


class PlannedStack(NamedTuple, Generic[E, Run]):
    """Matrices that are stepped together, in their order in the stack."""

    engine: E
    pieces: tuple[PlannedPiece[Run], ...]


def plan(members: Iterable[tuple[E, Run, int]], *, ranks: int = 1) -> list[PlannedStack[E, Run]]:
    """All matrices in stacks; those of one engine follow each other.

    Args:
      members: runs of output blocks, each with its engine and the number of its matrices.
      ranks: among how many a stack's matrices are shared.
    """
    alike: dict[E, list[tuple[Run, int]]] = defaultdict(list)
    for engine, run, count in members:
        alike[engine].append((run, count))
    result = []
    for engine, runs in alike.items():
        sizes = [count for _, count in runs]
        for cuts in plan_stacks(sizes, engine.bytes_a_matrix, engine.max_bytes, sharing=ranks):
            pieces = tuple(PlannedPiece(runs[i][0], start, stop) for i, start, stop in cuts)
            result.append(PlannedStack(engine, pieces))
    return result
