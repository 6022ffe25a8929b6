"""The PartitionSpec of every array of an optimizer's state."""

from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from normuon_core.layout import MatrixView
from optax_normuon.leaves.boxes import unbox
from optax_normuon.leaves.paths import KeyPath, named_leaves
from optax_normuon.mesh.found_views import found_views
from optax_normuon.mesh.scales import is_scale, scale_axes
from optax_normuon.mesh.specs import (
    MeshAxes,
    SpecTree,
    as_mesh_axes,
    as_partition_spec,
    check_rank,
    given_specs,
    own_shardings,
    partition_spec,
)
from optax_normuon.mesh.statistics import matrix_statistic_axes, statistic_axes

_Owner = tuple[KeyPath, tuple[int, ...], MeshAxes]
"""A parameter: its path, its shape, and how it lies."""


def state_specs(
    tx: optax.GradientTransformation, params: optax.Params, specs: SpecTree
) -> optax.OptState:
    """PartitionSpecs of an optimizer's state: for `jax.jit`, `jax.device_put` and Orbax.

    What belongs to a parameter lies as the parameter does. A statistic is not divided along axes that it
    has reduced, nor along the output axes of a leaf with `output_splits`. The scales of an int8 momentum
    are divided as it is, but not along their blocks where the mesh divides one of these, or where its
    size is not known from specs, parameters or `jax.set_mesh`. Counters are on every device.

        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(tx, params, specs))
        state = jax.jit(tx.init, out_shardings=shardings)(params)

    Args:
      tx: any transformation, whoever has wrapped it: an array of the state belongs to the parameter
        whose path is the end of its own.
      params: arrays or abstract arrays.
      specs: see `normuon`'s `param_specs`.

    Returns:
      A tree like the state, of PartitionSpecs, or of NamedShardings where `specs` are.

    Raises:
      ValueError: see `normuon`.
    """
    given = given_specs(specs, params)
    mesh = next((s.mesh for s in given.values() if isinstance(s, NamedSharding)), None)
    owners: list[_Owner] = []
    parameters = unbox(params)
    boxes = dict(zip(parameters.paths, parameters.places, strict=True))
    for path, name, leaf in named_leaves(params):
        spec, shape = as_partition_spec(given[path]), np.shape(leaf)
        check_rank(name, shape, spec, mesh)
        axes = as_mesh_axes(spec, len(shape))
        owners.append((path, shape, axes))
        if boxes[path] != path:
            # A statistic of another shape stands outside of its parameter's box.
            owners.append((boxes[path], shape, axes))
    # The longest path first: another parameter's path may end it.
    owners.sort(key=lambda owner: len(owner[0]), reverse=True)

    def spec_of(path: KeyPath, leaf: jax.ShapeDtypeStruct) -> PartitionSpec | NamedSharding:
        if is_scale(path):
            own, _, axes = next(owner for owner in owners if _ends_with(path, owner[0]))
            spec = partition_spec(scale_axes(scaled[own], axes, sizes))
        else:
            spec = _spec_of_state(path, np.shape(leaf), owners, views)
        return spec if mesh is None else NamedSharding(mesh, spec)

    state, views = found_views(tx, params)
    scaled = views | {boxes[path]: view for path, view in views.items()}
    sizes = _sizes_of_mesh(mesh, params)
    return jax.tree_util.tree_map_with_path(spec_of, state)


def _sizes_of_mesh(mesh: Mesh | AbstractMesh | None, params: optax.Params) -> Mapping[str, int]:
    """The sizes of the mesh axes: of the specs', of the one that is set, or the parameters'."""
    own = [sharding.mesh for sharding in jax.tree.leaves(own_shardings(params))]
    for each in (mesh, jax.sharding.get_abstract_mesh(), *own):
        if each is not None and not each.empty:
            return each.shape
    return {}


def _spec_of_state(
    path: KeyPath,
    shape: tuple[int, ...],
    owners: Sequence[_Owner],
    views: Mapping[KeyPath, MatrixView],
) -> PartitionSpec:
    for own, whole, axes in owners:
        # One key more: the statistics of a split leaf may be a tuple.
        found = _ends_with(path, own) or _ends_with(path[:-1], own)
        if found and len(shape) == len(whole):
            if own in views and shape != whole:
                return partition_spec(matrix_statistic_axes(shape, views[own], axes))
            return partition_spec(statistic_axes(shape, whole, axes))
    return PartitionSpec()


def _ends_with(path: KeyPath, end: KeyPath) -> bool:
    return len(path) >= len(end) and path[len(path) - len(end) :] == end
