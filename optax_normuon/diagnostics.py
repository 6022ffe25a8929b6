"""How large and how even a step was: numbers for each matrix, to log while a model trains."""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from normuon_core.cost import Algorithm
from normuon_core.layout import MatrixView
from normuon_core.recipes import Recipe, find_recipe
from optax_normuon.kernels.backend import Backend
from optax_normuon.leaves.arrays import Statistics
from optax_normuon.leaves.boxes import unbox
from optax_normuon.leaves.layout import LayoutTree, Views, resolve_layouts
from optax_normuon.leaves.paths import KeyPath, named_leaves
from optax_normuon.leaves.precision import lift, working_dtype
from optax_normuon.matrices.on_matrices import on_matrices
from optax_normuon.matrices.stack import MatrixStack, MatrixStage, chain_stages
from optax_normuon.matrices.views import split_blocks, split_statistic
from optax_normuon.mesh.collectives import everywhere
from optax_normuon.mesh.specs import SpecTree
from optax_normuon.plans import Execution
from optax_normuon.stages.int8_momentum import Int8Leaves
from optax_normuon.stages.momentum import Int8MomentumState, MomentumState, momentum_stage
from optax_normuon.stages.orthogonalization import Orthogonalizer


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
      blocks of a fused projection. Leaves whose update is `None` are left out. Norms are of squares:
      entries below 1e-19 count as zero.

    Raises:
      ValueError: the updates lack a leaf of the parameters, or, as TypeError, as
        `normuon(layout=layout).init` would.
    """
    views = resolve_layouts(layout, params)
    given = _given(updates, params, views)
    names, runs = [], []
    for path, name, leaf in named_leaves(params):
        if path in given:
            own = _sums_of_neurons(given[path], leaf, views[path])
            names += [name] * len(own)
            runs += own
    numbers: dict[str, list[MatrixDiagnostics]] = defaultdict(list)
    for name, own in zip(names, _numbers(runs), strict=True):
        numbers[name].append(own)
    return {name: MatrixDiagnostics(*_joined(own)) for name, own in numbers.items()}


def orthogonality_errors(
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    *,
    recipe: str | Recipe = "normuon",
    momentum: ArrayLike | None = None,
    layout: LayoutTree = None,
    orthogonalizer: Orthogonalizer | None = None,
    compute_dtype: DTypeLike | None = None,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
    param_specs: SpecTree = None,
    max_stack_bytes: int | None = None,
) -> dict[str, jax.Array]:
    """How far from orthogonal the polar factors of a step are, before neurons are normalized.

    Momentum and polar factor are done once more, in the step's own stacks: by themselves they take about
    as long as the step, and in one program with it XLA finds some of the work done. Ask every tenth step
    or less. See `orthogonality_error` for the number.

    Args:
      grads: as `normuon` is given them (clipped, say).
      state: the optimizer's, before the step: `normuon`'s within any others'.
      params: arrays or abstract arrays.
      recipe: as given to `normuon`. momentum: its value at this step, where it is not the recipe's.
      layout, orthogonalizer, compute_dtype, algorithm, backend, param_specs, max_stack_bytes: as given
        to `normuon`.

    Returns:
      By path the errors of the leaf's matrices, (matrices,). Leaves whose gradient is `None` are left
      out.

    Raises:
      ValueError: the state holds no momentum, the gradients lack a leaf of the parameters, or as
        `normuon` would.
    """
    chosen = find_recipe(recipe).override(momentum=momentum)
    views = resolve_layouts(layout, params)
    given = _given(grads, params, views)
    names = {path: name for path, name, _ in named_leaves(params) if path in given}
    directions = _directions(chosen, grads, state, params, views, names)
    execution = Execution(
        dataclasses.replace(chosen, norm_setting=None, neuron_norm=None),
        orthogonalizer=orthogonalizer,
        compute_dtype=compute_dtype,
        algorithm=algorithm,
        backend=backend,
    )
    measure = on_matrices(
        chain_stages(execution.stages(), _orthogonality_stage()),
        layout=layout,
        max_stack_bytes=max_stack_bytes,
        param_specs=param_specs,
    )
    _, (_, errors) = cast(Any, measure.update(directions, measure.init(params), params))
    leaves = unbox(params)
    return {
        names[path]: jnp.concatenate([run.ravel() for run in split_statistic(error, views[path])])
        for path, error in zip(leaves.paths, leaves.tree.flatten_up_to(errors), strict=True)
        if path in names
    }


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


def _given(updates: optax.Updates, params: optax.Params, views: Views) -> dict[KeyPath, jax.Array]:
    """The matrices' updates, or gradients; those that are `None` are not among them.

    Raises:
      ValueError: the tree is not like the parameters'.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda node: node is None)
    given = {path: leaf for path, leaf in leaves if path in views}
    for path, name, _ in named_leaves(params):
        if path in views and path not in given:
            raise ValueError(
                f"{name}: there is no update, or gradient, of this parameter: give a tree like the"
                " parameters, with None for what has none."
            )
    return {path: leaf for path, leaf in given.items() if leaf is not None}


def _orthogonality_stage() -> MatrixStage[Statistics]:
    """A stage that changes no matrix; its state becomes the error of each, (batch, 1, 1)."""

    def init(stack: MatrixStack) -> Statistics:
        values = stack.values
        return jnp.zeros((len(values), 1, 1), working_dtype(values.dtype))

    def update(stack: MatrixStack, state: Statistics) -> tuple[MatrixStack, Statistics]:
        return stack, orthogonality_error(stack.values).reshape(state.shape).astype(state.dtype)

    return MatrixStage(init, update)


def _directions(
    recipe: Recipe,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    views: Views,
    names: dict[KeyPath, str],
) -> optax.Updates:
    """The gradients with stage 1 done on the matrices."""
    count, kept = _momentum_in(state, params, views)
    missing = [name for path, name in names.items() if path not in kept]
    if missing:
        raise ValueError(
            f"the state has no momentum of {', '.join(missing)}: give the state of `normuon` or `muon`,"
            " made with the same layout."
        )
    stage = momentum_stage(recipe.momentum, momentum_dtype=None)
    given, tree = jax.tree.flatten(grads)
    leaves = {path: leaf for path, _, leaf in named_leaves(grads)}
    own = {name: leaves[path] for path, name in names.items()}
    before = MomentumState(count, {name: kept[path] for path, name in names.items()})
    updates, _ = stage.update(own, before)
    directions = cast(dict[str, jax.Array], updates)
    named = zip(leaves, given, strict=True)
    return tree.unflatten(directions.get(names.get(path, ""), leaf) for path, leaf in named)


class _Neurons(NamedTuple):
    """Of every output neuron the sums over its inputs, (matrices, outputs).

    Attributes:
      step, weight: of the squares of the update and of the weight. away: how many entries of the update
        lead away from zero.
    """

    step: jax.Array
    weight: jax.Array
    away: jax.Array


_Run = tuple[int, _Neurons]
"""Of matrices of one shape: how many inputs a neuron has, and the sums over them."""


def _sums_of_neurons(update: jax.Array, param: jax.Array, view: MatrixView) -> list[_Run]:
    """Of each run of a leaf's blocks."""
    dtype = working_dtype(update.dtype)
    steps, weights = (split_blocks(leaf.astype(dtype), view) for leaf in (update, param))
    inputs = -1 if view.output_stack_axis == -2 else -2
    runs = []
    for step, weight in zip(steps, weights, strict=True):
        # The update is added to the weight, so one sign of both leads away from zero.
        away = (jnp.sign(step) * jnp.sign(weight) > 0).astype(dtype)
        entries = jnp.square(step), jnp.square(weight), away
        sums = _Neurons(*(everywhere(each.sum(inputs)) for each in entries))
        runs.append((step.shape[inputs], sums))
    return runs


def _numbers(runs: Sequence[_Run]) -> list[MatrixDiagnostics]:
    """Of all that are alike at once: one by one they are many small programs on a GPU."""
    alike: dict[tuple, list[int]] = defaultdict(list)
    for index, (inputs, sums) in enumerate(runs):
        alike[inputs, sums.step.shape[1], sums.step.dtype].append(index)
    found: dict[int, MatrixDiagnostics] = {}
    for (inputs, *_), members in alike.items():
        each = [runs[index][1] for index in members]
        whole = _of_neurons(_Neurons(*_joined(each)), inputs)
        ends = list(itertools.accumulate(len(sums.step) for sums in each))
        for index, start, stop in zip(members, [0, *ends[:-1]], ends, strict=True):
            found[index] = MatrixDiagnostics(*(number[start:stop] for number in whole))
    return [found[index] for index in range(len(runs))]


def _joined(runs: Sequence[Sequence[jax.Array]]) -> Iterator[jax.Array]:
    """Each of several arrays of all runs, one behind the other."""
    return map(jnp.concatenate, zip(*runs, strict=True))


def _of_neurons(sums: _Neurons, inputs: int) -> MatrixDiagnostics:
    entries = inputs * sums.step.shape[1]
    total, norms = sums.step.sum(1), jnp.sqrt(sums.step)
    return MatrixDiagnostics(
        update_rms=jnp.sqrt(total / entries),
        update_to_weight=_over(jnp.sqrt(total), jnp.sqrt(sums.weight.sum(1))),
        neuron_norm_spread=_over(norms.std(1), norms.mean(1)),
        masked_decay=sums.away.sum(1) / entries,
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
