"""What is sent over a mesh, and how arrays are divided over it."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from optax_normuon.mesh.specs import MeshAxes, Specs, explicit_part, partition_spec

Result = TypeVar("Result")


def run_on_mesh(
    function: Callable[..., Result],
    specs: Specs,
    arguments: tuple[Any, ...],
    in_axes: tuple[Any, ...],
    out_axes: Any,
) -> Result:
    """Runs `function` on every device, on its parts of the arguments.

    Args:
      arguments: trees of arrays.
      in_axes, out_axes: trees of `MeshAxes`, like the arguments and the result.
    """

    def is_axes(node: object) -> bool:
        return isinstance(node, MeshAxes)

    def as_specs(tree: Any) -> Any:
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


def reshard_as(x: jax.Array, axes: MeshAxes, specs: Specs) -> jax.Array:
    """Divides an array as `axes` says over the mesh's explicit axes; the others are the compiler's."""
    spec = partition_spec(explicit_part(axes, specs))
    own = jax.typeof(x).sharding
    if all(not entry for entry in spec) and (own.mesh.empty or all(not e for e in own.spec)):
        return x
    if _padded(own.spec, x.ndim) == _padded(spec, x.ndim):
        return x
    return jax.reshard(x, NamedSharding(specs.mesh, spec))


def everywhere(x: jax.Array) -> jax.Array:
    """An array whole on every device, where a mesh's explicit axes divide it."""
    lies = jax.typeof(x).sharding
    return jax.reshard(x, NamedSharding(lies.mesh, PartitionSpec())) if any(lies.spec) else x


def _padded(spec: PartitionSpec, rank: int) -> tuple:
    return (*spec, *[None] * (rank - len(spec)))


def all_to_all(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sends row d of (destinations, ...) to device d; the result is (sources, ...)."""
    return with_bits(lambda x: jax.lax.all_to_all(x, axes, 0, 0), x)


def with_bits(function: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
    """Calls a collective that only moves numbers, half precision as integers.

    Compilers for CPUs would widen half precision, and send twice the bytes.
    """
    if x.dtype.itemsize != 2:
        return function(x)
    moved = function(jax.lax.bitcast_convert_type(x, jnp.uint16))
    return jax.lax.bitcast_convert_type(moved, x.dtype)
