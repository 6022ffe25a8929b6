"""How large and how even a step was: numbers for each matrix, to log while a model trains."""

from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from normuon_core.layout import MatrixView
from normuon_core.recipes import Recipe, find_recipe
from optax_normuon.leaves.layout import LayoutTree, Views, resolve_layouts
from optax_normuon.leaves.paths import KeyPath, named_leaves
from optax_normuon.leaves.precision import lift, working_dtype
from optax_normuon.matrices.views import split_blocks
from optax_normuon.stages.int8_momentum import Int8Leaves
from optax_normuon.stages.momentum import Int8MomentumState, MomentumState, momentum_stage
from optax_normuon.stages.orthogonalization import polar_factor
from optax_normuon.stages.row_equilibration import equilibrate_rows


class MatrixDiagnostics(NamedTuple):
    """Of each matrix of a leaf, arrays (matrices,) float32 (float64 of float64 updates).

    Attributes:
      update_rms: the root mean square of the update's entries.
      update_to_weight: the update's Frobenius norm over the weight's, before the step.
      neuron_norm_spread: the standard deviation of the norms of the update's output neurons, over their
        mean. NorMuon makes it small; Muon leaves what the polar factor has.
      masked_decay: the share of entries that cautious weight decay leaves out, because the update
        without decay moves them away from zero.
    """

    update_rms: jax.Array
    update_to_weight: jax.Array
    neuron_norm_spread: jax.Array
    masked_decay: jax.Array


def update_diagnostics(
    updates: optax.Updates, params: optax.Params, *, layout: LayoutTree = None
) -> dict[str, MatrixDiagnostics]:
    """What a step does to every matrix, from the updates that are about to be applied.

    Works beside any optimizer, in jit and on meshes, and reads each array once:

        updates, state = tx.update(grads, state, params)
        numbers = optax_normuon.update_diagnostics(updates, params)
        params = optax.apply_updates(params, updates)

    Args:
      updates: what `optax.apply_updates` is given, a tree like the parameters.
      params: before the step.
      layout: as for `normuon`; the leaves that are no matrices are left out.

    Returns:
      By path ("blocks/0/mlp/up/kernel") the numbers of each of the leaf's matrices: layers of a stack,
      blocks of a fused projection.

    Raises:
      ValueError, TypeError: as `normuon(layout=layout).init` would.
    """
    views = resolve_layouts(layout, params)
    given = {path: leaf for path, _, leaf in named_leaves(updates)}
    return {
        name: _of_leaf(given[path], leaf, views[path])
        for path, name, leaf in named_leaves(params)
        if path in views
    }


def orthogonality_errors(
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    *,
    recipe: str | Recipe = "normuon",
    momentum: ArrayLike | None = None,
    layout: LayoutTree = None,
    compute_dtype: DTypeLike | None = None,
) -> dict[str, jax.Array]:
    """How far from orthogonal the polar factors of a step are, before neurons are normalized.

    Momentum and polar factor are done once more, as the step does them, so that this costs about as much
    as the step: ask for it every tenth or hundredth. See `orthogonality_error` for the number.

    Args:
      grads: as `normuon` is given them (clipped, say).
      state: the optimizer's, before the step: `normuon`'s within any others'.
      params: arrays or abstract arrays.
      recipe: as given to `normuon`. momentum: its value at this step, where it is not the recipe's.
      layout, compute_dtype: as given to `normuon`.

    Returns:
      By path the errors of the leaf's matrices, (matrices,).

    Raises:
      ValueError: the state holds no momentum, or as `normuon` would.
    """
    chosen = find_recipe(recipe).override(momentum=momentum)
    views = resolve_layouts(layout, params)
    given = {path: leaf for path, _, leaf in named_leaves(grads)}
    count, kept = _momentum_in(state, params, views)
    missing = [name for path, name, _ in named_leaves(params) if path in views and path not in kept]
    if missing:
        raise ValueError(
            f"the state has no momentum of {', '.join(missing)}: give the state of `normuon` or `muon`,"
            " made with the same layout."
        )
    stage = momentum_stage(chosen.momentum, momentum_dtype=None)
    names = {path: name for path, name, _ in named_leaves(params) if path in views}
    own = {name: given[path] for path, name in names.items()}
    before = MomentumState(count, {name: kept[path] for path, name in names.items()})
    updates, _ = stage.update(own, before)
    directions = cast(dict[str, jax.Array], updates)
    if chosen.row_equilibration is not None:
        directions = _equilibrated(
            directions, grads, params, layout, **vars(chosen.row_equilibration)
        )
    errors = {}
    for path, name in names.items():
        factors = [
            polar_factor(block, **vars(chosen.polar), compute_dtype=compute_dtype)
            for block in split_blocks(directions[name], views[path])
        ]
        errors[name] = jnp.concatenate([orthogonality_error(factor) for factor in factors])
    return errors


def orthogonality_error(x: ArrayLike) -> jax.Array:
    """|G - I| / sqrt(k), G the Gram matrix of the shorter side, of k rows or columns.

    It is the root mean square of s^2 - 1 over the k singular values s: 0 for an orthogonal matrix, 1 for
    zero. Five steps of Polar Express leave about 0.1 on a well-conditioned matrix, Newton-Schulz 0.3.

    Args:
      x: (..., rows, columns), real floating point.

    Returns:
      (...), float32, or the dtype of `x` where that is wider.
    """
    x = jnp.asarray(x)
    x = x.astype(working_dtype(x.dtype))
    short = x if x.shape[-2] <= x.shape[-1] else x.swapaxes(-1, -2)
    gram = jnp.einsum("...ik,...jk->...ij", short, short, precision=jax.lax.Precision.HIGHEST)
    size = short.shape[-2]
    off = gram - jnp.broadcast_to(jnp.eye(size, dtype=x.dtype), gram.shape)
    return jnp.sqrt(jnp.square(off).sum((-2, -1)) / size)


def _equilibrated(
    directions: dict[str, jax.Array],
    grads: optax.Updates,
    params: optax.Params,
    layout: LayoutTree,
    eps: float,
) -> dict[str, jax.Array]:
    """The directions, by name, with the rows of each matrix equilibrated."""
    names = [name for _, name, _ in named_leaves(grads)]
    leaves, tree = jax.tree.flatten(grads)
    both = zip(names, leaves, strict=True)
    whole = jax.tree.unflatten(tree, [directions.get(name, leaf) for name, leaf in both])
    tx = equilibrate_rows(eps=eps, layout=layout)
    updates, _ = tx.update(whole, tx.init(params), params)
    return {name: leaf for _, name, leaf in named_leaves(updates) if name in directions}


def _of_leaf(update: jax.Array, param: jax.Array, view: MatrixView) -> MatrixDiagnostics:
    dtype = working_dtype(update.dtype)
    pairs = zip(
        split_blocks(update.astype(dtype), view),
        split_blocks(param.astype(dtype), view),
        strict=True,
    )
    runs = [_of_blocks(step, weight, view.output_stack_axis) for step, weight in pairs]
    return MatrixDiagnostics(*(jnp.concatenate(numbers) for numbers in zip(*runs, strict=True)))


def _of_blocks(step: jax.Array, weight: jax.Array, output_axis: int) -> MatrixDiagnostics:
    """Of (matrices, rows, columns)."""
    matrix, inputs = (-2, -1), -1 if output_axis == -2 else -2
    squares = jnp.square(step)
    total = squares.sum(matrix)
    norms = jnp.sqrt(squares.sum(inputs))
    # The update is added to the weight, so one sign of both leads away from zero.
    away = jnp.sign(step) * jnp.sign(weight) > 0
    return MatrixDiagnostics(
        update_rms=jnp.sqrt(total / (step.shape[-2] * step.shape[-1])),
        update_to_weight=_over(jnp.sqrt(total), jnp.sqrt(jnp.square(weight).sum(matrix))),
        neuron_norm_spread=_over(norms.std(-1), norms.mean(-1)),
        masked_decay=away.mean(matrix, dtype=step.dtype),
    )


def _over(above: jax.Array, below: jax.Array) -> jax.Array:
    """The ratio; 0 where both are."""
    both = (above == 0) & (below == 0)
    return jnp.where(
        both, jnp.zeros_like(above), above / jnp.where(both, jnp.ones_like(below), below)
    )


def _momentum_in(
    state: optax.OptState, params: optax.Params, views: Views
) -> tuple[jax.Array, dict[KeyPath, jax.Array]]:
    """The step count and, by path, the momentum of every leaf in a state that has one."""
    kinds = (MomentumState, Int8MomentumState)
    leaves = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, kinds))
    found = [leaf for leaf in leaves if isinstance(leaf, kinds)]
    if not found:
        raise ValueError("the state holds no momentum: give the state of `normuon` or `muon`.")
    kept = {}
    for each in found:
        momentum = each.momentum
        if isinstance(each, Int8MomentumState):
            momentum = Int8Leaves.of(views, None, params).read(
                momentum, each.momentum_scale, lift(params)
            )
        kept |= {path: leaf for path, _, leaf in named_leaves(momentum)}
    return jnp.asarray(found[0].count), kept
