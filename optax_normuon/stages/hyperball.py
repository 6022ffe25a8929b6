"""The last stage of a recipe whose matrices keep their norms: a step on the hyperball."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from normuon_core.hyperparameters import check_radius, check_rate
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree, Views, resolve_layouts
from optax_normuon.leaves.multipliers import MultiplierTree, resolve_multipliers
from optax_normuon.leaves.parameters import check_leaves, require_params
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.leaves.precision import as_schedule, in_working_precision
from optax_normuon.matrices.groups import Groups, matrices_of
from optax_normuon.mesh.found_views import note_views
from optax_normuon.stages.radius import keep_radii, on_groups


class SphereState(NamedTuple):
    """The state of `to_sphere` and `to_hyperball`.

    Attributes:
      count: steps done, int32.
      radius: None where it is a number; else a tree like the parameters of the norms at the start, with
        size 1 on the axes that they are over, float32 (float64 for float64).
    """

    count: ArrayLike
    radius: Any


@refuse_injection_of_static_arguments
def to_hyperball(
    learning_rate: optax.ScalarOrSchedule,
    *,
    radius: ArrayLike | None = None,
    lr_mul: MultiplierTree = None,
    layout: LayoutTree | Views = None,
) -> optax.GradientTransformationExtraArgs:
    """Ends a chain: every matrix takes a step of relative length eta, and its norm stays what it was.

    For any direction u, as `scale_by_normuon` or `optax.scale_by_adam` makes it: it stands in the place
    of `optax.scale_by_learning_rate`, and needs no weight decay. With N(x) = x / |x| and the Frobenius
    norm of one matrix,

        w <- R N(w - eta R N(u))

    The scale of u does not matter. A matrix without an update, and one that is zero, is left alone: a
    matrix that starts at zero never moves. Source: MuonH, https://tinyurl.com/muonh, and
    `MuonHyperball` of NVIDIA's Emerging-Optimizers.

    Args:
      learning_rate: eta, a number or a schedule: the step over the norm, about the angle.
      radius: R, a number above 0 for all matrices, which the first step puts them on; None keeps in the
        state what each matrix's norm was at `init`.
      lr_mul, layout: see `normuon`. Leaves that are no matrices have their update times -eta lr_mul, as
        `optax.scale_by_learning_rate` would.

    Returns:
      A transformation that needs parameters: float32 arithmetic, or the parameter's dtype where that is
      wider; the updates, in the parameter's dtype, make `optax.apply_updates` land on the sphere.

    Raises:
      ValueError: a rate that is negative, a radius that is not positive, or see `normuon`.
    """
    check_rate("learning_rate", learning_rate)
    check_radius("radius", radius)
    rate = as_schedule(learning_rate)

    def init(params: optax.Params) -> SphereState:
        views = resolve_layouts(layout, params)
        note_views(views)
        resolve_multipliers(lr_mul, params, views, what="lr_mul")
        groups = {path: matrices_of(view) for path, view in views.items()}
        return SphereState(jnp.zeros([], jnp.int32), keep_radii(radius, params, groups))

    def update(updates, state, params=None):
        params = require_params(params)
        check_leaves(updates, params)
        views = resolve_layouts(layout, params)
        factors = resolve_multipliers(lr_mul, params, views, what="lr_mul")
        eta = rate(state.count)

        def rate_on(path: KeyPath, u: jax.Array) -> jax.Array:
            return jnp.asarray(eta, u.dtype) * jnp.asarray(factors.on(path), u.dtype)

        def move(path: KeyPath, u, p, groups: Groups, r: jax.Array) -> jax.Array:
            return hyperball_step(u, p, groups, r, rate_on(path, u))

        groups = {path: matrices_of(view) for path, view in views.items()}
        moved = on_groups(move, updates, params, groups, radius, state.radius)
        moved = scale_others(moved, views, rate_on)
        return moved, SphereState(optax.safe_increment(state.count), state.radius)

    return in_working_precision(optax.GradientTransformation(init, update))


def hyperball_step(
    u: jax.Array, p: jax.Array, groups: Groups, radius: jax.Array, rate: jax.Array
) -> jax.Array:
    """What is added to one leaf: R N(p - rate R N(u)) - p. All arrays have one dtype."""
    length, own = groups.norm(u), groups.norm(p)
    target = p - rate * radius * (u / jnp.where(length == 0, 1, length))
    reached = groups.norm(target)
    still = (length == 0) | (own == 0) | (reached == 0)
    return jnp.where(still, 0, target * (radius / jnp.where(reached == 0, 1, reached)) - p)


def scale_others(updates: optax.Updates, moved: Any, rate_on) -> optax.Updates:
    """Leaves that have no sphere, times minus their rate: a step as in a flat space.

    Args:
      moved: the paths of the leaves that have one.
      rate_on: (path, update) to the leaf's rate.
    """

    def scale(path: KeyPath, u: jax.Array | None) -> jax.Array | None:
        return u if u is None or path in moved else -rate_on(path, u) * u

    return jax.tree_util.tree_map_with_path(scale, updates, is_leaf=lambda leaf: leaf is None)
