"""Slices of constant norm, as in nGPT: steps along a sphere, and projections to it and its tangents."""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from normuon_core.hyperparameters import check_choice, check_radius, check_rate
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree, Views, resolve_layouts
from optax_normuon.leaves.multipliers import MultiplierTree, resolve_multipliers
from optax_normuon.leaves.parameters import check_leaves, require_params
from optax_normuon.leaves.paths import KeyPath, named_leaves
from optax_normuon.leaves.precision import as_schedule, in_working_precision
from optax_normuon.leaves.prefixes import broadcast_prefix, called_on
from optax_normuon.matrices.groups import Groups, slices_along, slices_of
from optax_normuon.mesh.found_views import note_views
from optax_normuon.stages.hyperball import SphereState, scale_others
from optax_normuon.stages.radius import keep_radii, on_groups

Path = Literal["geodesic", "retraction"]
Angle = Literal["rate", "tangent"]

AxisTree = Any
"""An axis or a tuple of axes, None for a leaf without slices, a tree or prefix tree of these, or a
callable from the parameters to one. None at the root takes the reduction axes of the layout."""

_NO_TANGENT = 4
"""In units of rounding: how much of an update lies off its slice where that is rounding alone."""


class ProjectionState(NamedTuple):
    """The state of `project_to_sphere`.

    Attributes:
      radius: as in `SphereState`.
    """

    radius: Any


@refuse_injection_of_static_arguments
def to_sphere(
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis: AxisTree = None,
    path: Path = "geodesic",
    angle: Angle = "rate",
    radius: ArrayLike | None = 1.0,
    lr_mul: MultiplierTree = None,
    layout: LayoutTree = None,
) -> optax.GradientTransformationExtraArgs:
    """Ends a chain: every slice turns by an angle against its update, and its norm stays R.

    For weights that are normalised, as nGPT's are. It stands in the place of
    `optax.scale_by_learning_rate`: it is given the direction of ascent u, turns the slice the other way,
    and nothing may be chained behind it. With w^ = w / |w| and the tangent t = u - w^ <w^, u>,

        geodesic:    w <- R (w^ cos theta - t^ sin theta)
        retraction:  w <- R N(w^ - theta t^)

    theta is eta lr_mul (`angle="rate"`: the size of u does not matter), or eta lr_mul |t| ("tangent").
    The two paths differ by theta^3 / 3. A slice whose update has no tangent, beyond rounding, is left
    alone, and so is one that is zero. Source: nGPT, arXiv 2410.01131, whose projection after a plain
    step is `project_to_sphere`.

    Args:
      learning_rate: eta, a number or a schedule.
      axis: along which axis or axes of each leaf its slices lie, see `AxisTree`; None at the root: the
        input weights of every output neuron.
      path: "geodesic" or "retraction". angle: "rate" or "tangent".
      radius: R, a number above 0, which the first step puts a slice on; None keeps in the state what
        each slice's norm was at `init`.
      lr_mul, layout: see `normuon`. Leaves without slices have their update times -eta lr_mul, as
        `optax.scale_by_learning_rate` would.

    Returns:
      A transformation that needs parameters: float32 arithmetic, or the parameter's dtype where that is
      wider; the updates, in the parameter's dtype, make `optax.apply_updates` land on the sphere.

    Raises:
      ValueError: an unknown path or angle, a negative rate, a radius that is not positive, an axis that
        the leaf does not have or has twice, or see `normuon`. TypeError: an axis that is no integer.
    """
    check_rate("learning_rate", learning_rate)
    check_choice("path", path, Path)
    check_choice("angle", angle, Angle)
    check_radius("radius", radius)
    rate = as_schedule(learning_rate)

    def init(params: optax.Params) -> SphereState:
        groups, views = _find_slices(axis, layout, params)
        resolve_multipliers(lr_mul, params, views, what="lr_mul")
        return SphereState(jnp.zeros([], jnp.int32), keep_radii(radius, params, groups))

    def update(updates, state, params=None):
        params = require_params(params)
        check_leaves(updates, params)
        groups, views = _find_slices(axis, layout, params)
        factors = resolve_multipliers(lr_mul, params, views, what="lr_mul")
        eta = rate(state.count)

        def rate_on(leaf: KeyPath, u: jax.Array) -> jax.Array:
            return jnp.asarray(eta, u.dtype) * jnp.asarray(factors.on(leaf), u.dtype)

        def move(leaf: KeyPath, u, p, groups: Groups, r: jax.Array) -> jax.Array:
            return sphere_step(u, p, groups, r, rate_on(leaf, u), path=path, angle=angle)

        moved = on_groups(move, updates, params, groups, radius, state.radius)
        moved = scale_others(moved, groups, rate_on)
        return moved, SphereState(optax.safe_increment(state.count), state.radius)

    return in_working_precision(optax.GradientTransformation(init, update))


@refuse_injection_of_static_arguments
def project_to_sphere(
    *, axis: AxisTree = None, radius: ArrayLike | None = 1.0, layout: LayoutTree = None
) -> optax.GradientTransformationExtraArgs:
    """Ends a chain, behind the learning rate: a plain step, and then every slice back to norm R.

    w <- R N(w + update), which is how nGPT's authors train. A slice that would become zero keeps its
    update. `optax.conditionally_transform(project_to_sphere(...), lambda step: step % k == k - 1)`
    projects after every k-th step only.

    Args:
      axis, radius, layout: see `to_sphere`. Leaves without slices keep their updates.

    Returns, raises: as `to_sphere`.
    """
    check_radius("radius", radius)

    def init(params: optax.Params) -> ProjectionState:
        groups, _ = _find_slices(axis, layout, params)
        return ProjectionState(keep_radii(radius, params, groups))

    def project(_: KeyPath, u, p, groups: Groups, r: jax.Array) -> jax.Array:
        moved = p + u
        length = groups.norm(moved)
        return jnp.where(length == 0, u, moved * (r / jnp.where(length == 0, 1, length)) - p)

    def update(updates, state, params=None):
        params = require_params(params)
        check_leaves(updates, params)
        groups, _ = _find_slices(axis, layout, params)
        return on_groups(project, updates, params, groups, radius, state.radius), state

    return in_working_precision(optax.GradientTransformation(init, update))


@refuse_injection_of_static_arguments
def project_to_tangent(
    *, axis: AxisTree = None, layout: LayoutTree = None
) -> optax.GradientTransformationExtraArgs:
    """Takes from every slice of a gradient or an update what points along its weights.

    u <- u - w^ <w^, u> with w^ = w / |w|; a slice of zeros keeps its update. Before the momentum it
    makes gradients of a normalised model tangent; `to_sphere` does by itself what it needs.

    Args:
      axis, layout: see `to_sphere`. Leaves without slices keep their updates.

    Returns:
      A stateless transformation that needs parameters. Raises: as `to_sphere`.
    """

    def init(params: optax.Params) -> optax.EmptyState:
        _find_slices(axis, layout, params)
        return optax.EmptyState()

    def project(_: KeyPath, u, p, groups: Groups, r: jax.Array) -> jax.Array:
        return tangent(u, unit(p, groups), groups)

    def update(updates, state, params=None):
        params = require_params(params)
        check_leaves(updates, params)
        groups, _ = _find_slices(axis, layout, params)
        return on_groups(project, updates, params, groups, 1.0, None), state

    return in_working_precision(optax.GradientTransformation(init, update))


def unit(p: jax.Array, groups: Groups) -> jax.Array:
    """Every slice over its norm; zeros stay zeros."""
    length = groups.norm(p)
    return p / jnp.where(length == 0, 1, length)


def tangent(u: jax.Array, w: jax.Array, groups: Groups) -> jax.Array:
    """What of u is orthogonal to w, whose slices have norm 1 or 0.

    Subtracted twice: where u is nearly along w, the first pass leaves rounding errors along w that are
    no longer small beside the tangent.
    """
    for _ in range(2):
        u = u - w * groups.dot(w, u)
    return u


def sphere_step(
    u: jax.Array,
    p: jax.Array,
    groups: Groups,
    radius: jax.Array,
    rate: jax.Array,
    *,
    path: Path,
    angle: Angle,
) -> jax.Array:
    """What is added to one leaf: its new slices less p. All arrays have one dtype.

    The retraction needs no norm of its own: w^ and t^ are orthogonal, so |w^ - theta t^|^2 is
    1 + theta^2, and the slice turns by arctan theta.
    """
    w = unit(p, groups)
    t = tangent(u, w, groups)
    length = groups.norm(t)
    # A NaN is not left alone: the comparison is false for it.
    still = (length <= _NO_TANGENT * jnp.finfo(u.dtype).eps * groups.norm(u)) | (
        groups.norm(p) == 0
    )
    theta = rate * length if angle == "tangent" else rate
    if path == "geodesic":
        along, across = jnp.cos(theta), jnp.sin(theta)
    else:
        along = jax.lax.rsqrt(1 + jnp.square(theta))
        across = theta * along
    new = radius * (w * along - t * (across / jnp.where(still, 1, length)))
    return jnp.where(still, 0, new - p)


def _find_slices(
    axis: AxisTree, layout: LayoutTree, params: optax.Params
) -> tuple[Mapping[KeyPath, Groups], Views]:
    """(the slices of every leaf that has any, the matrices that the layout finds)."""
    if axis is None:
        views = resolve_layouts(layout, params)
        note_views(views)
        return {path: slices_of(view) for path, view in views.items()}, views
    given = broadcast_prefix(called_on(axis, params), params, is_leaf=_is_axes, what="axis")
    groups = {
        path: slices_along(_checked(given[path], np.shape(leaf), name))
        for path, name, leaf in named_leaves(params)
        if given[path] is not None
    }
    views = Views() if layout is None else resolve_layouts(layout, params)
    return groups, views


def _is_axes(node: object) -> bool:
    return node is None or (
        isinstance(node, tuple) and bool(node) and all(isinstance(each, int) for each in node)
    )


def _checked(axes: Any, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The axes of one leaf, none negative."""
    axes = axes if isinstance(axes, tuple) else (axes,)
    rank = len(shape)
    if not all(isinstance(each, int) for each in axes):
        raise TypeError(
            f"{name}: axis={axes[0]!r} is no integer; give an axis of the leaf of shape {shape}, a tuple"
            " of axes, or None for a leaf without slices."
        )
    positive = tuple(each % rank for each in axes if -rank <= each < rank)
    if len(positive) < len(axes) or len(set(positive)) < len(positive):
        own = axes[0] if len(axes) == 1 else axes
        raise ValueError(
            f"{name}: axis={own} does not fit the shape {shape}; give different axes from {-rank} to"
            f" {rank - 1}, or None for a leaf without slices."
        )
    return positive
