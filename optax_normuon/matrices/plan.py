"""The plan of a step: which matrices share a stack, and where and in which form it is orthogonalized.

It is made at trace time, once for each engine: XLA's stages (`on_matrices`) and the kernels
(`steps.fused`). Both step the stacks that it lists, on one device and on a mesh, and `describe` prints
them.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from normuon_core.deal import Deal
from normuon_core.placement import Placement, Spread
from normuon_core.stacks import plan_stacks
from optax_normuon.matrices.waves import in_waves
from optax_normuon.mesh.leaf_on_mesh import LeafOnMesh
from optax_normuon.mesh.matrix_sharding import MatrixSharding, spread_of
from optax_normuon.mesh.specs import Specs

DEFAULT_MAX_STACK_BYTES = 2**30

LeafKey = TypeVar("LeafKey", bound=Hashable)
"""What a leaf is known by: its key path, or its number."""


class StackKey(NamedTuple):
    """What matrices must have in common to share a stack.

    Attributes:
      rows, columns: the sides of a whole matrix, as its engine holds it.
      sharding: how it is divided over the mesh; None without a mesh.
      dtype: the dtype in which it comes.
      rest: whatever else the engine cannot do within one stack.
    """

    rows: int
    columns: int
    sharding: MatrixSharding | None
    dtype: str
    rest: Hashable


class Engine(Protocol):
    """What steps the stacks, as far as the plan depends on it.

    Attributes:
      name: as `describe` prints it.
    """

    @property
    def name(self) -> str: ...

    def stack_keys(self, leaf: LeafOnMesh, dtype: str) -> list[StackKey]:
        """For each run of a leaf's output blocks the key of the stacks that its matrices may join."""
        ...

    def place(self, spread: Spread) -> Placement:
        """Where the matrices of one key are orthogonalized, and in which form."""
        ...

    def bytes_a_matrix(self, spread: Spread, placement: Placement) -> int:
        """The engine's estimate of the memory that one matrix of a stack takes on a device."""
        ...


class PlannedPiece(NamedTuple, Generic[LeafKey]):
    """Matrices `start` to `stop` of one run of output blocks of one leaf."""

    leaf: LeafKey
    run: int
    start: int
    stop: int


class PlannedStack(NamedTuple, Generic[LeafKey]):
    """Matrices that are stepped together, and where.

    Attributes:
      key: what they have in common.
      group_size: how many matrices a device has in all stacks of this key.
      placement: of all these stacks.
      pieces: where the matrices come from, in their order in the stack.
      deal: which owner has which of them.
      wave: stacks of one wave are under way together: none is worked on before all have come to their
        owners, and none goes back before all are done. None for a stack by itself.
    """

    key: StackKey
    group_size: int
    placement: Placement
    pieces: tuple[PlannedPiece[LeafKey], ...]
    deal: Deal
    wave: int | None = None

    @property
    def count(self) -> int:
        """Matrices of which a device has parts."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def plan(
    leaves: Mapping[LeafKey, LeafOnMesh],
    dtypes: Mapping[LeafKey, np.dtype],
    engine: Engine,
    specs: Specs | None,
    *,
    ceiling: int,
) -> list[PlannedStack[LeafKey]]:
    """All matrices of the leaves in stacks; stacks of one key follow each other.

    Stacks that their owners do not divide evenly are dealt together, in waves, where that gives the
    busiest device noticeably less to do.

    Args:
      dtypes: the dtypes of the leaves.
      ceiling: bytes of a stack on one device, see `stack_ceiling`.
    """
    groups: dict[StackKey, list[PlannedPiece[LeafKey]]] = defaultdict(list)
    for name, leaf in leaves.items():
        keys = engine.stack_keys(leaf, dtypes[name].name)
        for number, (run, key) in enumerate(zip(leaf.view.runs, keys, strict=True)):
            groups[key].append(PlannedPiece(name, number, 0, leaf.local.matrices(run)))
    stacks = [s for group in groups.items() for s in _stacks(*group, engine, specs, ceiling)]
    return stacks if specs is None else in_waves(stacks, specs, ceiling=ceiling)


def _stacks(
    key: StackKey,
    pieces: list[PlannedPiece[LeafKey]],
    engine: Engine,
    specs: Specs | None,
    ceiling: int,
) -> Iterator[PlannedStack[LeafKey]]:
    sizes = [piece.stop for piece in pieces]
    spread = spread_of(
        key.sharding,
        specs,
        count=sum(sizes),
        rows=key.rows,
        columns=key.columns,
        dtype=key.dtype,
    )
    placement = engine.place(spread)
    each = engine.bytes_a_matrix(spread, placement)
    for stretches in plan_stacks(sizes, each, ceiling, owners=placement.owners):
        own = tuple(pieces[i]._replace(start=start, stop=stop) for i, start, stop in stretches)
        count = sum(stop - start for _, start, stop in stretches)
        yield PlannedStack(key, spread.count, placement, own, Deal(count, placement.owners))


def stack_ceiling(max_stack_bytes: int | None) -> int:
    """The ceiling in bytes.

    Raises:
      ValueError: it is not positive.
    """
    ceiling = DEFAULT_MAX_STACK_BYTES if max_stack_bytes is None else max_stack_bytes
    if ceiling <= 0:
        raise ValueError(f"max_stack_bytes={max_stack_bytes} must be positive, or None for 1 GiB.")
    return ceiling
