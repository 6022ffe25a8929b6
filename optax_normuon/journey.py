"""The way of a stack over a mesh, for the kernels: `normuon_core.fused_step.Journey` in JAX."""

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from normuon_core.fused_step import Piece
from normuon_core.launches import Geometry, neurons_on_rows, padded
from normuon_core.placement import Placement, place
from normuon_core.polar_iteration import choose_form
from normuon_core.recipes import Recipe
from optax_normuon.orthogonalization import dtype_on_shards
from optax_normuon.sharding import Cut, Owners, Sides, spread_of
from optax_normuon.specs import Specs
from optax_normuon.stacking import PlacedLeaf

if TYPE_CHECKING:
    from optax_normuon.kernel_step import KernelSettings


class Kind(NamedTuple):
    """Matrices that can share a stack.

    Attributes:
      short, long: of a whole matrix.
      cut: how a device's part is cut, its rows being the short side; None without a mesh.
      neurons_on_short: on a mesh, whose owners make the statistics of a whole stack at once.
    """

    short: int
    long: int
    cut: Cut | None
    neurons_on_short: bool | None


def kinds_of(leaf: PlacedLeaf, recipe: Recipe) -> list[Kind]:
    """One for each run of output blocks of a leaf."""
    axis = "output" if recipe.neuron_norm is None else recipe.neuron_norm.axis
    result = []
    for run, cut in zip(leaf.view.runs, leaf.cuts, strict=True):
        _, rows, columns = leaf.view.block_stack_shape(run.size)
        tall = rows > columns
        side = None
        if cut is not None:
            side = neurons_on_rows(axis, rows, columns, leaf.view.output_is_rows) != tall
            if tall:
                cut = cut._replace(rows=cut.columns, columns=cut.rows)
        result.append(Kind(min(rows, columns), max(rows, columns), cut, side))
    return result


def place_kind(
    kind: Kind,
    count: int,
    settings: "KernelSettings",
    specs: Specs | None,
    *,
    may_stay: bool = False,
) -> Placement:
    """Where a kind's matrices are orthogonalized.

    Args:
      may_stay: whether they may also stay divided, which no kernel does.
    """
    steps = len(settings.recipe.polar.coefficients)
    form, dtype = choose_form(
        kind.short,
        kind.long,
        steps,
        algorithm=settings.algorithm,
        compute_dtype=settings.compute_dtype,
        on_gpu=True,
        symmetric=True,
    )
    may_stay &= settings.algorithm != "standard" and settings.compute_dtype != "bfloat16"
    on_shards = jnp.dtype(dtype_on_shards(settings.compute_dtype)).itemsize
    return place(
        spread_of(kind.cut, specs, count=count, rows=kind.short, columns=kind.long),
        steps,
        form=form,
        itemsize=jnp.dtype(dtype).itemsize,
        symmetric=True,
        shard_itemsize=on_shards if may_stay else None,
    )


def stay_as_shards(
    leaves: Mapping[Any, PlacedLeaf], settings: "KernelSettings", specs: Specs | None
) -> set[Hashable]:
    """The leaves that no kernel steps: too lonely to be moved, or fused and cut through their blocks."""
    if specs is None:
        return set()
    result = {path for path, leaf in leaves.items() if leaf.axes != specs.leaves[path]}
    kinds = {path: kinds_of(leaf, settings.recipe) for path, leaf in leaves.items()}
    counts: dict[Kind, int] = defaultdict(int)
    for path, own in kinds.items():
        for kind, run in zip(own, leaves[path].view.runs, strict=True):
            counts[kind] += leaves[path].local.matrices(run)
    stay = {
        kind
        for kind, count in counts.items()
        if place_kind(kind, count, settings, specs, may_stay=True).strategy == "shards"
    }
    return result | {path for path, own in kinds.items() if stay & set(own)}


@dataclass(frozen=True)
class Journey:
    """See `normuon_core.fused_step.Journey`; within a `jax.shard_map`.

    Attributes:
      owners: the way of its matrices, their rows being the short side.
      geometry: of one device's parts. count: of the stack.
    """

    owners: Owners
    geometry: Geometry
    count: int

    @classmethod
    def of(
        cls, cut: Cut, placement: Placement, specs: Specs, *, geometry: Geometry, count: int
    ) -> "Journey":
        """For a stack of `count` matrices."""
        return cls(Owners.of(cut, placement, specs, count=count), geometry, count)

    @property
    def owned(self) -> int:
        return self.owners.each

    def all_partials(self, partials):
        gathered = self.owners.gather_parts(partials)
        return gathered.reshape(len(partials), -1)

    def to_owner(self, x):
        _, long = self.geometry.whole
        whole = self.owners.collect(self.owners.share(x[..., : self.geometry.long]))
        return _widened(whole, padded(long))

    def home(self, v):
        _, long = self.geometry.whole
        return _widened(self.owners.hand_back(v[..., :long], self.count), self.geometry.pitch)

    def statistics_to_owner(self, pieces: Sequence[tuple[Piece, Any]]):
        own = [x[piece.start : piece.start + piece.count] for piece, x in pieces]
        x = self._beside_reduced(jnp.concatenate(own))
        return self.owners.collect_statistic(x, self._sides).reshape(self.owned, -1)

    def statistics_home(self, statistics: Sequence[Any], sums):
        sent = [(self._beside_reduced(x), self._sides) for x in statistics]
        # Numbers of a whole matrix, which no side divides.
        flat = sums.reshape(self.owned, 1, -1)
        numbers = [(flat[..., i : i + 1], Sides(False, False)) for i in range(flat.shape[-1])]
        back = self.owners.hand_back_statistics(sent + numbers, self.count)
        known = [x.reshape(self.count, -1) for x in back[: len(sent)]]
        numbers = jnp.concatenate(back[len(sent) :], axis=-1)
        return known, numbers.reshape(self.count, *sums.shape[1:])

    def rates_to_owner(self, pieces: Sequence[Piece]):
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

    def _beside_reduced(self, x):
        return x[:, :, None] if self.geometry.neurons_on_short else x[:, None, :]


def _widened(x, pitch: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (0, 0), (0, pitch - x.shape[-1])])
