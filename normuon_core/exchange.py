"""How a stack of the kernels travels over a mesh: what a framework provides for `fused_step`."""

from collections.abc import Callable, Sequence
from typing import Protocol

from normuon_core.kernels.pieces import Array, Piece


class Exchange(Protocol):
    """How one stack's matrices travel over a mesh; this device has parts of `count` of them."""

    @property
    def owned(self) -> int:
        """How many matrices this device orthogonalizes."""
        ...

    def gather_partials(self, partials: Array) -> Array:
        """All parts' sums, (count, sums of a whole matrix), from this device's (count, short, long)."""
        ...

    def to_owners(self, x: Array) -> Array:
        """(count, short, padded long) of parts to (owned, short, padded long) of whole matrices."""
        ...

    def on_owned(self, function: Callable[[Array, int], Array], x: Array) -> Array:
        """function(x, count) of the `count` matrices of x that this device really has.

        Those up to `owned` are zeros, and of the result they are so again if they are left out.
        """
        ...

    def to_holders(self, v: Array) -> Array:
        """The inverse of `to_owners`."""
        ...

    def statistics_to_owners(self, pieces: Sequence[tuple[Piece, Array]]) -> Array:
        """All neurons of what is owned, from each piece's (matrices, neurons here)."""
        ...

    def statistics_to_holders(
        self, statistics: Sequence[Array], sums: Array
    ) -> tuple[list[Array], Array]:
        """From (owned, neurons) each and (owned, ...) to (count, neurons here) and (count, ...)."""
        ...

    def rates_to_owners(self, pieces: Sequence[Piece]) -> tuple[Array, int]:
        """(rows of rates, consecutive matrices of what is owned that share one)."""
        ...
