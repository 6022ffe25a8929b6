"""What travels over a mesh, and how arrays are laid on it."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from optax_normuon.mesh.specs import MeshAxes, Specs, explicit_part, partition_spec


def run_on_mesh(function: Callable, specs: Specs, arguments, in_axes, out_axes):
    """`function` on one device's parts of the arguments.

    Args:
      arguments: a tuple of trees. in_axes, out_axes: trees of `MeshAxes`, like the arguments and the
        result.
    """

    def is_axes(node) -> bool:
        return isinstance(node, MeshAxes)

    def as_specs(tree):
        return jax.tree.map(partition_spec, tree, is_leaf=is_axes)

    arguments = jax.tree.map(
        lambda axes, x: reshard_as(x, axes, specs), in_axes, arguments, is_leaf=is_axes
    )
    return jax.shard_map(
        function,
        mesh=specs.mesh,
        in_specs=as_specs(in_axes),
        out_specs=as_specs(out_axes),
        axis_names=set(specs.axes),
        check_vma=False,
    )(*arguments)


def reshard_as(x, axes: MeshAxes, specs: Specs):
    """The array divided as `axes` says on the mesh's explicit axes; the others are the compiler's."""
    spec = partition_spec(explicit_part(axes, specs))
    own = jax.typeof(x).sharding
    if all(not entry for entry in spec) and (own.mesh.empty or all(not e for e in own.spec)):
        return x
    if _padded(own.spec, x.ndim) == _padded(spec, x.ndim):
        return x
    return jax.reshard(x, NamedSharding(specs.mesh, spec))


def _padded(spec, rank: int) -> tuple:
    return (*spec, *[None] * (rank - len(spec)))


def all_to_all(x, axes: tuple[str, ...]):
    """All-to-all: (destinations, ...) to (sources, ...)."""
    return with_bits(lambda x: jax.lax.all_to_all(x, axes, 0, 0), x)


def with_bits(function, x):
    """A collective that moves numbers without reading them: as integers where they are half precision,
    which compilers for CPUs would widen."""
    if x.dtype.itemsize != 2:
        return function(x)
    moved = function(jax.lax.bitcast_convert_type(x, jnp.uint16))
    return jax.lax.bitcast_convert_type(moved, x.dtype)
