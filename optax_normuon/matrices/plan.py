"""The plan of a step: which matrices share a stack, and where and in which form it is orthogonalized.

It is made at trace time, once for each engine: XLA's stages (`on_matrices`) and the kernels
(`steps.fused`). Both step the stacks that it lists, on one device and on a mesh, and `describe` prints
them.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from normuon_core.placement import Placement, Spread
from normuon_core.stacks import plan_stacks
from optax_normuon.mesh.cut import Cut, spread_of
from optax_normuon.mesh.placed_leaf import PlacedLeaf
from optax_normuon.mesh.specs import Specs

DEFAULT_MAX_STACK_BYTES = 2**30

Key = TypeVar("Key", bound=Hashable)


class Alike(NamedTuple):
    """What matrices must have in common to share a stack.

    Attributes:
      rows, columns: of a whole matrix, as its engine holds it.
      cut: how a device's part of it is cut; None without a mesh.
      dtype: in which it comes.
      rest: what else the engine cannot do side by side.
    """

    rows: int
    columns: int
    cut: Cut | None
    dtype: str
    rest: Hashable


class Engine(Protocol):
    """What steps the stacks, as far as the plan depends on it.

    Attributes:
      name: as `describe` prints it.
    """

    @property
    def name(self) -> str: ...

    def alike(self, leaf: PlacedLeaf, dtype: str) -> list[Alike]:
        """For each run of a leaf's output blocks what its matrices need to have in common."""
        ...

    def place(self, spread: Spread) -> Placement:
        """Where a group of matrices is orthogonalized, and in which form."""
        ...

    def bytes_a_matrix(self, spread: Spread, placement: Placement) -> int:
        """The engine's estimate of the memory that one matrix of a stack takes on a device."""
        ...


class Piece(NamedTuple, Generic[Key]):
    """Matrices `start` to `stop` of one run of output blocks of one leaf."""

    leaf: Key
    run: int
    start: int
    stop: int


class Stack(NamedTuple, Generic[Key]):
    """Matrices that are stepped together, and where.

    Attributes:
      alike: what they have in common. group: how many matrices a device has of all stacks that do.
      placement: of that group.
      pieces: where they come from, in their order in the stack.
    """

    alike: Alike
    group: int
    placement: Placement
    pieces: tuple[Piece[Key], ...]

    @property
    def count(self) -> int:
        """Matrices of which a device has parts."""
        return sum(piece.stop - piece.start for piece in self.pieces)


def plan(
    leaves: Mapping[Key, PlacedLeaf],
    dtypes: Mapping[Key, Any],
    engine: Engine,
    specs: Specs | None,
    *,
    ceiling: int,
) -> list[Stack[Key]]:
    """All matrices of the leaves in stacks; those of one group follow each other.

    Args:
      dtypes: of the leaves.
      ceiling: bytes of a stack on one device, see `stack_ceiling`.
    """
    groups: dict[Alike, list[Piece[Key]]] = defaultdict(list)
    for key, leaf in leaves.items():
        kinds = engine.alike(leaf, dtypes[key].name)
        for number, (run, alike) in enumerate(zip(leaf.view.runs, kinds, strict=True)):
            groups[alike].append(Piece(key, number, 0, leaf.local.matrices(run)))
    return [stack for group in groups.items() for stack in _stacks(*group, engine, specs, ceiling)]


def _stacks(
    alike: Alike, pieces: list[Piece[Key]], engine: Engine, specs: Specs | None, ceiling: int
) -> Iterator[Stack[Key]]:
    sizes = [piece.stop for piece in pieces]
    spread = spread_of(
        alike.cut,
        specs,
        count=sum(sizes),
        rows=alike.rows,
        columns=alike.columns,
        dtype=alike.dtype,
    )
    placement = engine.place(spread)
    each = engine.bytes_a_matrix(spread, placement)
    for cuts in plan_stacks(sizes, each, ceiling, owners=placement.owners):
        own = tuple(pieces[i]._replace(start=start, stop=stop) for i, start, stop in cuts)
        yield Stack(alike, spread.count, placement, own)


def stack_ceiling(max_stack_bytes: int | None) -> int:
    """The ceiling in bytes.

    Raises:
      ValueError: it is not positive.
    """
    ceiling = DEFAULT_MAX_STACK_BYTES if max_stack_bytes is None else max_stack_bytes
    if ceiling <= 0:
        raise ValueError(f"max_stack_bytes={max_stack_bytes} must be positive, or None for 1 GiB.")
    return ceiling
