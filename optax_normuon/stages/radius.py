"""Spheres of the slices or the matrices of a tree: their radii, and a step of each leaf that has any."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from normuon_core.hyperparameters import check_radius
from optax_normuon.leaves.boxes import unbox
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.leaves.precision import working_dtype
from optax_normuon.matrices.groups import Groups
from optax_normuon.mesh.collectives import reshard_as
from optax_normuon.mesh.leaf_on_mesh import leaf_on_mesh, state_axes
from optax_normuon.mesh.specs import Specs, resolve_specs

Move = Callable[[KeyPath, jax.Array, jax.Array, Groups, jax.Array], jax.Array]
"""A step of one leaf: (path, update, parameter, its groups, their radii) to what is added."""


def keep_radii(
    radius: ArrayLike | None, params: optax.Params, groups: Mapping[KeyPath, Groups]
) -> Any:
    """What the state has of the radii: the norms of these parameters if `radius` is None, else nothing.

    Returns:
      None, or a tree like the parameters, with the norms in the shape of `Groups.total` and
      `optax.MaskedNode` for a leaf without groups. As in `on_matrices`, a norm stands where its leaf
      does, but outside of the leaf's Flax box.
    """
    check_radius("radius", radius)
    if radius is not None:
        return None
    specs = resolve_specs(None, params)
    parameters = unbox(params)

    def norms(path: KeyPath, leaf) -> Any:
        if path not in groups:
            return None if leaf is None else optax.MaskedNode()
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.eval_shape(lambda x: norms(path, x), leaf)
        values = jnp.asarray(leaf).astype(working_dtype(leaf.dtype))
        own = jnp.sqrt(groups[path].total(jnp.square(values)))
        return _as_state(own, path, groups[path], specs)

    return parameters.tree.unflatten(
        norms(path, leaf) for path, leaf in zip(parameters.paths, parameters.leaves, strict=True)
    )


def on_groups(
    move: Move,
    updates: optax.Updates,
    params: optax.Params,
    groups: Mapping[KeyPath, Groups],
    radius: ArrayLike | None,
    kept: Any,
) -> optax.Updates:
    """`move` on every leaf that has groups and a gradient; the others' updates are left as they are.

    Args:
      updates, params: leaves that belong together have one dtype.
      radius, kept: a radius for all, or what `keep_radii` has made.
    """
    unboxed = unbox(updates)
    parameters = unbox(params)
    own = dict(zip(parameters.paths, parameters.leaves, strict=True))
    radii = [radius] * len(unboxed.leaves) if kept is None else unboxed.tree.flatten_up_to(kept)

    def moved(path: KeyPath, u: jax.Array | None, r: Any) -> jax.Array | None:
        if u is None or path not in groups:
            return u
        r = jnp.asarray(r, u.dtype)
        return move(path, u, own[path], groups[path], r if kept is None else groups[path].spread(r))

    return unboxed.boxed(
        [moved(path, u, r) for path, u, r in zip(unboxed.paths, unboxed.leaves, radii, strict=True)]
    )


def _as_state(x: jax.Array, path: KeyPath, groups: Groups, specs: Specs | None) -> jax.Array:
    """Divided as the state of a matrix stage is; slices without a layout lie as their sums do."""
    if specs is None or groups.view is None:
        return x
    return reshard_as(x, state_axes(x.shape, leaf_on_mesh(groups.view, path, specs)), specs)
