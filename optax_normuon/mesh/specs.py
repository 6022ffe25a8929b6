"""Over which mesh axes every leaf is divided: read from the arrays' types, or given by the caller."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from optax_normuon.leaves.paths import KeyPath, NamedLeaves, named_leaves, path_name
from optax_normuon.leaves.prefixes import broadcast_prefix, called_on

GivenSpec = PartitionSpec | NamedSharding | None
"""How one leaf is divided, as callers say it; None is a leaf that every device has whole."""

SpecTree = Any
"""A PartitionSpec (or NamedSharding, or None for a replicated leaf), a tree or prefix tree of them, or a
callable from the parameters to one."""


class MeshAxes(tuple[tuple[str, ...], ...]):
    """For every axis of an array the mesh axes that divide it, major to minor.

    A class of its own tells it from the tuples of a tree.
    """

    __slots__ = ()


@dataclass(frozen=True)
class Specs:
    """How the leaves of one tree lie on a mesh.

    Attributes:
      mesh: the mesh.
      axes: those of its axes that we divide arrays over, in the mesh's order. The others are left to the
        compiler, or to the caller within `jax.shard_map`.
      leaves: the `MeshAxes` of each leaf.
    """

    mesh: AbstractMesh
    axes: tuple[str, ...]
    leaves: Mapping[KeyPath, MeshAxes]

    def parts(self, axes: tuple[str, ...]) -> int:
        """Devices along several mesh axes together."""
        return math.prod(self.mesh.shape[axis] for axis in axes)

    def local_shape(self, shape: tuple[int, ...], axes: MeshAxes) -> tuple[int, ...]:
        """The shape of one device's part of an array."""
        return tuple(size // self.parts(own) for size, own in zip(shape, axes, strict=True))


def partition_spec(axes: MeshAxes) -> PartitionSpec:
    """The same as JAX's PartitionSpec."""
    return PartitionSpec(*(own[0] if len(own) == 1 else own or None for own in axes))


def resolve_specs(
    param_specs: SpecTree | Specs, tree: optax.Params, *, mesh: Mesh | AbstractMesh | None = None
) -> Specs | None:
    """How the leaves of `tree` lie; None where nothing is divided, or the compiler is to decide.

    Without `param_specs` the arrays' types tell it, for the mesh axes that are in explicit mode.

    Args:
      tree: parameters, or gradients: arrays or abstract arrays.
      mesh: None is the one that is set, or the arrays' or specs' own.

    Raises:
      ValueError: a spec longer than its leaf's rank, a mesh axis that the mesh lacks, that is named
        twice or that the leaf cannot leave (it belongs to a `jax.shard_map` around the call), a spec
        other than the array's own, leaves on different meshes, or specs without a mesh. It names
        leaf, spec and mesh.
    """
    if isinstance(param_specs, Specs):
        return param_specs
    leaves = named_leaves(tree)
    given = given_specs(param_specs, tree)
    own = {path: _own_sharding(leaf) for path, _, leaf in leaves}
    mesh = _common_mesh(leaves, given, own, mesh)
    if mesh.empty:
        _check_without_mesh(leaves, given)
        return None
    if param_specs is None:
        axes = axes_in(mesh, AxisType.Explicit)
    else:
        axes = axes_in(mesh, AxisType.Explicit, AxisType.Auto)
    checked = {
        path: _checked(name, np.shape(leaf), given.get(path), own[path], mesh)
        for path, name, leaf in leaves
    }
    return Specs(mesh, axes, checked) if axes else None


def explicit_part(axes: MeshAxes, specs: Specs) -> MeshAxes:
    """Only those mesh axes that are in explicit mode, which an array's type shows."""
    explicit = axes_in(specs.mesh, AxisType.Explicit)
    return MeshAxes(tuple(name for name in own if name in explicit) for own in axes)


def given_specs(param_specs: SpecTree, tree: optax.Params) -> Mapping[KeyPath, GivenSpec]:
    """What a caller says of each leaf.

    Raises:
      ValueError: a value that is no spec, or a tree that does not match.
    """
    if param_specs is None:
        return {}
    if not _is_spec(param_specs):
        param_specs = called_on(param_specs, tree)
    given = broadcast_prefix(param_specs, tree, is_leaf=_is_spec, what="param_specs")
    for path, spec in given.items():
        if not _is_spec(spec):
            raise ValueError(
                f"{path_name(path)}: a spec must be a PartitionSpec, a NamedSharding or None, got"
                f" {spec!r}."
            )
    return given


def _is_spec(node: object) -> bool:
    return node is None or isinstance(node, PartitionSpec | NamedSharding)


def as_partition_spec(given: GivenSpec) -> PartitionSpec:
    """The spec without its mesh; () for a leaf that every device has whole."""
    if isinstance(given, NamedSharding):
        return given.spec
    return PartitionSpec() if given is None else given


def own_shardings(tree: optax.Params) -> SpecTree:
    """The NamedSharding of every array that has one, None for others: what `param_specs` takes."""

    def own(leaf: object) -> NamedSharding | None:
        sharding = getattr(leaf, "sharding", None)
        return sharding if isinstance(sharding, NamedSharding) else None

    return jax.tree.map(own, tree)


def _own_sharding(leaf: object) -> NamedSharding | None:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding if isinstance(leaf.sharding, NamedSharding) else None
    if not isinstance(leaf, jax.Array):
        return None
    return jax.typeof(leaf).sharding


def _common_mesh(
    leaves: NamedLeaves,
    given: Mapping[KeyPath, GivenSpec],
    own: Mapping[KeyPath, NamedSharding | None],
    mesh: Mesh | AbstractMesh | None,
) -> AbstractMesh:
    """The mesh of the arrays, of the specs and of the context, which must be one."""
    found = jax.sharding.get_abstract_mesh() if mesh is None else _abstract(mesh)
    for path, name, _ in leaves:
        for sharding in (own[path], given.get(path)):
            if not isinstance(sharding, NamedSharding):
                continue
            other = _abstract(sharding.mesh)
            if found.empty:
                found = other
            elif not other.empty and other.shape_tuple != found.shape_tuple:
                raise ValueError(
                    f"{name}: spec {sharding.spec} is on the mesh {_sizes(other)}, but"
                    f" {_sizes(found)} is set, or is other leaves' mesh; put all arrays and specs on"
                    " one mesh, and set that one with jax.set_mesh."
                )
    return found


def _abstract(mesh: Mesh | AbstractMesh) -> AbstractMesh:
    return mesh if isinstance(mesh, AbstractMesh) else mesh.abstract_mesh


def axes_in(mesh: AbstractMesh, *modes: AxisType) -> tuple[str, ...]:
    """The mesh's axes that are in one of these modes."""
    modes_of_axes = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, mode in modes_of_axes if mode in modes)


def _sizes(mesh: Mesh | AbstractMesh) -> str:
    return "(" + ", ".join(f"{name}={size}" for name, size in mesh.shape.items()) + ")"


def _check_without_mesh(leaves: NamedLeaves, given: Mapping[KeyPath, GivenSpec]) -> None:
    for path, name, _ in leaves:
        spec = as_partition_spec(given.get(path))
        if any(entry is not None for entry in spec):
            raise ValueError(
                f"{name}: spec {spec} names mesh axes, but there is no mesh (): put the parameters"
                " on one with jax.device_put, or set it with jax.set_mesh."
            )


def check_rank(
    name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh | AbstractMesh | None
) -> None:
    """Raises a ValueError for a spec with more entries than the leaf has axes."""
    if len(spec) > len(shape):
        on = "" if mesh is None else f" on the mesh {_sizes(mesh)}"
        raise ValueError(
            f"{name}: spec {spec}{on} has {len(spec)} entries, but the leaf of shape {tuple(shape)}"
            f" has {len(shape)} axes; give one entry an axis at most."
        )


def _checked(
    name: str,
    shape: tuple[int, ...],
    given: GivenSpec,
    own: NamedSharding | None,
    mesh: AbstractMesh,
) -> MeshAxes:
    """The leaf's axes: as given, else as its type says."""

    def refuse(spec: PartitionSpec, problem: str) -> NoReturn:
        raise ValueError(f"{name}: spec {spec} on the mesh {_sizes(mesh)}: {problem}")

    of_type = PartitionSpec() if own is None or own.mesh.empty else own.spec
    explicit = set(axes_in(mesh, AxisType.Explicit))
    typed = MeshAxes(
        tuple(axis for axis in axes if axis in explicit)
        for axes in as_mesh_axes(of_type, len(shape))
    )
    if given is None:
        return typed
    spec = as_partition_spec(given)
    check_rank(name, shape, spec, mesh)
    if any(entry is PartitionSpec.UNCONSTRAINED for entry in spec):
        refuse(spec, "an unconstrained axis says nothing; give a mesh axis or None.")
    axes = as_mesh_axes(spec, len(shape))
    named = [axis for own_axes in axes for axis in own_axes]
    for axis in named:
        if axis not in mesh.shape:
            refuse(spec, f"the mesh has no axis {axis!r}; use {', '.join(mesh.axis_names)}.")
        if named.count(axis) > 1:
            refuse(spec, f"axis {axis!r} is named twice; an axis divides one side only.")
        if axis in mesh.manual_axes:
            refuse(
                spec,
                f"the leaf cannot leave axis {axis!r}, which a jax.shard_map around this call has"
                " divided it over already; call the optimizer outside of it, or leave the axis out"
                " if the parts are matrices of their own.",
            )
    given_explicit = MeshAxes(tuple(a for a in own_axes if a in explicit) for own_axes in axes)
    if own is not None and not own.mesh.empty and given_explicit != typed:
        refuse(spec, f"the array's own is {own.spec}; leave param_specs out, or give that.")
    sizes = [math.prod(mesh.shape[axis] for axis in own_axes) for own_axes in axes]
    # JAX keeps no array that its axes do not divide evenly, whatever was asked for.
    return MeshAxes(
        own_axes if size % parts == 0 else ()
        for size, parts, own_axes in zip(shape, sizes, axes, strict=True)
    )


def as_mesh_axes(spec: PartitionSpec, rank: int) -> MeshAxes:
    """The `MeshAxes` of a PartitionSpec's entries, which may be fewer than the array's axes."""
    entries = [*spec, *[None] * (rank - len(spec))]
    return MeshAxes(
        () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
        for entry in entries
    )
