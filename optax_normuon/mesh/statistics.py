"""How the statistics of a leaf lie on a mesh: arrays of its rank with some sides reduced to 1."""

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding
from jax.typing import DTypeLike

from normuon_core.layout import MatrixView
from optax_normuon.mesh.specs import MeshAxes, Specs, axes_in, explicit_part, partition_spec


def statistic_axes(shape: tuple[int, ...], leaf_shape: tuple[int, ...], axes: MeshAxes) -> MeshAxes:
    """How a statistic of a leaf lies: as the leaf does, but along axes that it has reduced."""
    return MeshAxes(
        own if size == whole and size > 1 else ()
        for size, whole, own in zip(shape, leaf_shape, axes, strict=True)
    )


def unfolded_axes(view: MatrixView, axes: MeshAxes) -> MeshAxes:
    """How a leaf lies once its layout has unfolded an axis: the first new axis is divided like it."""
    if view.folded is None:
        return axes
    first, count = view.folded
    return MeshAxes((*axes[: first + 1], *[()] * (count - 1), *axes[first + 1 :]))


def matrix_statistic_axes(shape: tuple[int, ...], view: MatrixView, axes: MeshAxes) -> MeshAxes:
    """As `statistic_axes`, for a statistic of matrices: the blocks of a fused projection stay whole.

    Args:
      view: of the whole leaf. axes: how the leaf lies while its matrices are moved.
    """
    of_view = MeshAxes(
        () if view.is_split and axis in view.output_axes else own
        for axis, own in enumerate(unfolded_axes(view, axes))
    )
    lying = statistic_axes(view.unfolded(shape), view.shape, of_view)
    if view.folded is None:
        return lying
    first, count = view.folded
    return MeshAxes((*lying[: first + 1], *lying[first + count :]))


def zeros_beside(
    leaf: jax.Array,
    shape: tuple[int, ...],
    dtype: DTypeLike,
    axes: MeshAxes | None,
    specs: Specs | None,
) -> jax.Array:
    """Zeros that lie as `axes` says on the mesh of `leaf`; without a mesh, on the default device."""
    if specs is None or axes is None or not isinstance(leaf, jax.Array):
        return jnp.zeros(shape, dtype)
    if isinstance(leaf, Tracer):
        sharding = NamedSharding(specs.mesh, partition_spec(explicit_part(axes, specs)))
        zeros = jnp.zeros(shape, dtype, out_sharding=sharding)
        automatic = set(axes_in(specs.mesh, AxisType.Auto))
        rest = MeshAxes(tuple(name for name in own if name in automatic) for own in axes)
        if not any(rest):
            return zeros
        return jax.lax.with_sharding_constraint(
            zeros, NamedSharding(specs.mesh, partition_spec(rest))
        )
    if not isinstance(leaf.sharding, NamedSharding):
        return jnp.zeros(shape, dtype)
    sharding = NamedSharding(leaf.sharding.mesh, partition_spec(axes))
    return jnp.zeros(shape, dtype, device=sharding)
