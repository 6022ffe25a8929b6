"""How a stack of the kernels travels over a mesh: `normuon_core.exchange.Exchange` in JAX."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from normuon_core.kernels.geometry import Geometry, padded
from normuon_core.kernels.pieces import Piece
from optax_normuon.leaves.arrays import Matrices, Statistics
from optax_normuon.mesh.owners import Owners, Sides


@dataclass(frozen=True)
class Exchange:
    """See `normuon_core.exchange.Exchange`; within a `jax.shard_map`.

    Attributes:
      owners: of its matrices, whose rows are the short side.
      geometry: of one device's parts.
    """

    owners: Owners
    geometry: Geometry

    @property
    def owned(self) -> int:
        return self.owners.each

    def gather_partials(self, partials: jax.Array) -> jax.Array:
        gathered = self.owners.gather_parts(partials)
        return gathered.reshape(len(partials), -1)

    def to_owners(self, x: Matrices) -> Matrices:
        _, long = self.geometry.whole
        whole = self.owners.to_owners(self.owners.replicas_share(x[..., : self.geometry.long]))
        return _widened(whole, padded(long))

    def on_owned(self, function: Callable[[Matrices, int], Matrices], x: Matrices) -> Matrices:
        return self.owners.on_own(lambda x: function(x, len(x)), x)

    def to_holders(self, v: Matrices) -> Matrices:
        _, long = self.geometry.whole
        return _widened(self.owners.to_holders(v[..., :long]), self.geometry.pitch)

    def statistics_to_owners(self, pieces: Sequence[tuple[Piece, jax.Array]]) -> jax.Array:
        own = [x[piece.start : piece.start + piece.count] for piece, x in pieces]
        x = self._beside_reduced(jnp.concatenate(own))
        return self.owners.statistic_to_owners(x, self._sides).reshape(self.owned, -1)

    def statistics_to_holders(
        self, statistics: Sequence[jax.Array], sums: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        sent = [(self._beside_reduced(x), self._sides) for x in statistics]
        # No side of these numbers is divided: they are of whole matrices.
        flat = sums.reshape(self.owned, 1, -1)
        numbers = [(flat[..., i : i + 1], Sides(False, False)) for i in range(flat.shape[-1])]
        back = self.owners.statistics_to_holders(sent + numbers)
        known = [x.reshape(len(x), -1) for x in back[: len(sent)]]
        numbers = jnp.concatenate(back[len(sent) :], axis=-1)
        return known, numbers.reshape(len(numbers), *sums.shape[1:])

    def rates_to_owners(self, pieces: Sequence[Piece]) -> tuple[jax.Array, int]:
        rates = pieces[0].block.leaf.rates
        if len(rates) == 1:
            return rates, self.geometry.matrices_a_rate
        rows = [
            piece.block.leaf.rates[
                (piece.start + jnp.arange(piece.count)) // piece.block.geometry.matrices_a_rate
            ]
            for piece in pieces
        ]
        return self.owners.own_rows(jnp.concatenate(rows)), 1

    @property
    def _sides(self) -> Sides:
        return Sides(self.geometry.neurons_on_short, not self.geometry.neurons_on_short)

    def _beside_reduced(self, x: jax.Array) -> Statistics:
        """(matrices, neurons) with the reduced side as an axis of size 1."""
        return x[:, :, None] if self.geometry.neurons_on_short else x[:, None, :]


def _widened(x: Matrices, pitch: int) -> Matrices:
    """Rows of `pitch` entries, as the kernels want them."""
    return jnp.pad(x, [(0, 0), (0, 0), (0, pitch - x.shape[-1])])
