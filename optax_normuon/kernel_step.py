"""JAX arrays through `normuon_core.fused_step`: the step of matrices by kernels.

All arithmetic of a step is in the kernels that PyTorch runs as well, in the same order. State and
updates are those of the chain of transformations that the kernels stand for.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normuon_core.fused_step import Block, Leaf, Piece, form_of, polar_factors_of_pieces, step_stack
from normuon_core.fused_step import iterate_stack as iterate_with
from normuon_core.kernels import RATES
from normuon_core.launches import Geometry, Output, block_geometries, bytes_a_matrix
from normuon_core.layout import MatrixLayout, MatrixView, Run
from normuon_core.polar_iteration import Algorithm
from normuon_core.polynomials import Coefficients
from normuon_core.recipes import Polar, Recipe
from normuon_core.shape_rules import shape_factor
from normuon_core.stacks import even_stacks
from optax_normuon import launcher
from optax_normuon.boxes import unbox
from optax_normuon.journey import Journey, Kind, kinds_of, place_kind, stay_as_shards
from optax_normuon.layout import Views
from optax_normuon.momentum import MomentumState
from optax_normuon.multipliers import Multipliers
from optax_normuon.paths import named_leaves
from optax_normuon.precision import as_schedule
from optax_normuon.sharding import run_on_mesh
from optax_normuon.specs import Axes, Specs, unfolded_axes
from optax_normuon.stacking import (
    PlacedLeaf,
    as_leaf,
    as_stack,
    join_statistic,
    place_leaf,
    split_statistic,
    stack_ceiling,
    state_axes,
)
from optax_normuon.weight_decay import WeightDecayState


@dataclass(frozen=True)
class KernelSettings:
    """What is the same for all matrices of a step. compute_dtype: a name, or None for the form's own."""

    recipe: Recipe
    compute_dtype: str | None
    algorithm: Algorithm
    max_stack_bytes: int | None


class Weight(NamedTuple):
    """One weight's arrays in a step.

    Attributes:
      gradient, parameter, momentum: of the weight's shape.
      second_moment: as the state keeps it, see `on_matrices`; empty without stage 3.
      scales, decays: one array for each run of output blocks, over the batch axes and then the blocks,
        float32.
    """

    gradient: Any
    parameter: Any
    momentum: Any
    second_moment: Any
    scales: tuple
    decays: tuple


class Stepped(NamedTuple):
    """What a step makes of a `Weight`."""

    delta: Any
    momentum: Any
    second_moment: Any


def polar_factors(
    stack: jax.Array, polar: Polar, *, compute_dtype: str | None, algorithm: Algorithm
) -> jax.Array:
    """Stage 2 of a stack (count, rows, columns), in the compute dtype; under `vmap` one larger stack."""

    @jax.custom_batching.custom_vmap
    def factors(stack):
        view = MatrixLayout(reduction_axis=-1, output_axis=-2).on(stack.shape)
        rates = jnp.zeros((1, RATES), jnp.float32)
        leaf = Leaf(stack, None, rates, rates, _output(rates), _output(rates))
        (geometry,) = block_geometries(view, _row_major(view))
        count = len(stack)
        v, _ = polar_factors_of_pieces(
            launcher.launch,
            launcher.describe_device(),
            [Piece(Block(leaf, geometry, count, None, None, None), 0, count)],
            polar,
            momentum=None,
            compute_dtype=compute_dtype,
            algorithm=algorithm,
        )
        v = v[..., : geometry.long]
        return v.mT if stack.shape[-2] > stack.shape[-1] else v

    @factors.def_vmap
    def _(axis_size, in_batched, stacks):
        del in_batched
        merged = factors(stacks.reshape(-1, *stacks.shape[-2:]))
        return merged.reshape(axis_size, -1, *merged.shape[-2:]), True

    return factors(stack)


def iterate_stack(x, coefficients: Coefficients, form, dtype: str):
    """The iteration alone, on a stack (count, rows, columns) that is normalised and scaled."""
    rows, columns = x.shape[-2:]
    tall = rows > columns
    wide = x.mT if tall else x
    view = MatrixLayout(reduction_axis=-1, output_axis=-2).on(wide.shape)
    (geometry,) = block_geometries(view, _row_major(view))
    v = iterate_with(
        launcher.launch,
        launcher.describe_device(),
        jnp.pad(wide, [(0, 0), (0, 0), (0, geometry.pitch - geometry.long)]),
        coefficients,
        geometry=geometry,
        count=len(wide),
        form=form,
        dtype=dtype,
    )[..., : geometry.long]
    return v.mT if tall else v


def step_weights(
    leaves: Sequence[PlacedLeaf],
    weights: Sequence[Weight],
    rates,
    settings: KernelSettings,
    specs: Specs | None = None,
) -> list[Stepped]:
    """All stages of all weights; under `vmap` of weights with one more batch axis.

    Args:
      weights: on a mesh one device's parts of them.
      rates: (runs, `kernels.RATES`) float32; a weight's matrices are cut into as many equal runs.
    """

    @jax.custom_batching.custom_vmap
    def step(weights, rates):
        return _step_weights(leaves, weights, rates.reshape(-1, RATES), settings, specs)

    @step.def_vmap
    def _(axis_size, in_batched, weights, rates):
        weights, rates = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)),
            (weights, rates),
            tuple(in_batched),
        )
        wider = [
            leaf._replace(
                view=_with_leading_batch(leaf.view, axis_size),
                local=_with_leading_batch(leaf.local, axis_size),
            )
            for leaf in leaves
        ]
        result = step_weights(wider, weights, rates.reshape(-1, RATES), settings, specs)
        return result, jax.tree.map(lambda _: True, result)

    return step(list(weights), rates)


def _with_leading_batch(view: MatrixView, size: int) -> MatrixView:
    def moved(axes):
        return tuple(axis + 1 for axis in axes)

    return replace(
        view,
        shape=(size, *view.shape),
        batch_axes=(0, *moved(view.batch_axes)),
        row_axes=moved(view.row_axes),
        column_axes=moved(view.column_axes),
        folded=None if view.folded is None else (view.folded[0] + 1, view.folded[1]),
    )


def _step_weights(
    leaves: Sequence[PlacedLeaf],
    weights: Sequence[Weight],
    rates,
    settings: KernelSettings,
    specs: Specs | None,
):
    laid_out = [
        _LaidOut(leaf, weight, rates, settings.recipe)
        for leaf, weight in zip(leaves, weights, strict=True)
    ]
    stacks: dict[Kind, list[Block]] = defaultdict(list)
    for weight in laid_out:
        for kind, block in zip(
            kinds_of(weight.placed, settings.recipe), weight.blocks, strict=True
        ):
            stacks[kind].append(block)
    ceiling = stack_ceiling(settings.max_stack_bytes)
    done: list[Leaf] = []
    for kind in _in_order(stacks):
        blocks = stacks[kind]
        geometry, sizes = blocks[0].geometry, [block.batch for block in blocks]
        _, dtype = form_of(
            geometry.whole,
            settings.recipe.polar,
            compute_dtype=settings.compute_dtype,
            algorithm=settings.algorithm,
            device=launcher.describe_device(),
        )
        placement = place_kind(kind, sum(sizes), settings, specs)
        working_bytes = bytes_a_matrix(geometry, dtype)
        if placement.strategy == "owners":
            working_bytes += _bytes_on_the_way(geometry, dtype)
        limit = max(1, ceiling // working_bytes)
        for cuts in even_stacks(sizes, limit, owners=placement.owners):
            count = sum(stop - start for _, start, stop in cuts)
            journey = None
            if specs is not None and kind.cut is not None and placement.strategy == "owners":
                journey = Journey.of(kind.cut, placement, specs, geometry=geometry, count=count)
            pieces = [Piece(blocks[index], start, stop - start) for index, start, stop in cuts]
            if journey is not None:
                _wait_for_the_last_but_one(pieces[0].block.leaf, done)
            step_stack(
                launcher.launch,
                launcher.describe_device(),
                pieces,
                settings.recipe,
                compute_dtype=settings.compute_dtype,
                algorithm=settings.algorithm,
                journey=journey,
            )
            done.append(pieces[-1].block.leaf)
    return [weight.stepped() for weight in laid_out]


def _in_order(stacks: Mapping[Kind, Sequence[Block]]) -> list[Kind]:
    """The smallest first and the second smallest last: no other stack's work hides their ways."""

    def entries(kind: Kind) -> int:
        return kind.short * kind.long * sum(block.batch for block in stacks[kind])

    ascending = sorted(stacks, key=entries)
    return [*ascending[:1], *ascending[2:], *ascending[1:2]]


def _bytes_on_the_way(geometry: Geometry, dtype: str) -> int:
    """Of one whole matrix: what is sent and what is received of the stack that travels meanwhile."""
    short, long = geometry.whole
    return 2 * short * long * jnp.dtype(dtype).itemsize


def _wait_for_the_last_but_one(leaf: Leaf, done: Sequence[Leaf]) -> None:
    """So that one stack travels while another is worked on, and no more are in memory."""
    if len(done) > 1 and done[-2] is not leaf:
        before = done[-2]
        leaf.gradient, before.delta = jax.lax.optimization_barrier((leaf.gradient, before.delta))


class _LaidOut:
    """A weight as the kernels take it, and the way back."""

    def __init__(self, placed: PlacedLeaf, weight: Weight, rates, recipe: Recipe):
        view = placed.local
        self.placed, self.view, self.weight, self.recipe = placed, view, weight, recipe
        # What no stride can reach is brought to a stack first.
        self.in_place = view.strides() is not None
        laid_out = view if self.in_place else view.stacked
        gradient, parameter, momentum = (
            x if self.in_place else as_stack(x, view)
            for x in (weight.gradient, weight.parameter, weight.momentum)
        )
        moments = [None] * len(view.runs)
        if recipe.neuron_norm is not None:
            moments = [_flat(x) for x in split_statistic(weight.second_moment, view)]
        self.leaf = Leaf(
            gradient=gradient,
            parameter=parameter,
            momentum=momentum,
            rates=rates,
            momentum_output=_output(momentum),
            delta_output=_output(parameter),
        )
        rule = recipe.neuron_norm
        geometries = block_geometries(
            laid_out,
            _row_major(laid_out),
            whole=placed.view,
            axis="output" if rule is None else rule.axis,
            rates=len(rates),
        )
        self.blocks = [
            Block(
                self.leaf,
                geometry,
                view.matrices(run),
                moment,
                scale.reshape(-1),
                decay.reshape(-1),
            )
            for run, geometry, moment, scale, decay in zip(
                view.runs, geometries, moments, weight.scales, weight.decays, strict=True
            )
        ]

    def stepped(self) -> Stepped:
        delta, momentum = (
            x if self.in_place else as_leaf(x, self.view)
            for x in (self.leaf.delta, self.leaf.momentum)
        )
        kept = self.weight.second_moment
        if self.recipe.neuron_norm is not None:
            moments = [
                _moment_of(block).reshape(old.shape)
                for block, old in zip(self.blocks, split_statistic(kept, self.view), strict=True)
            ]
            kept = join_statistic(moments, self.view, like=kept)
        return Stepped(delta, momentum, kept)


def _flat(moment):
    """(matrices, rows or 1, columns or 1) as (matrices, neurons)."""
    return moment.reshape(len(moment), -1)


def _moment_of(block: Block):
    return jnp.concatenate(block.new_moments) if block.new_moments else block.second_moment


def with_kernels(
    chain: optax.GradientTransformation,
    settings: KernelSettings,
    *,
    views: Views,
    specs: Specs | None,
    learning_rate: optax.ScalarOrSchedule,
    decay_rate: optax.Schedule,
    lr_factors: Multipliers,
    wd_factors: Multipliers,
) -> optax.GradientTransformation:
    """The chain of a recipe's stages for matrices, its update made by the kernels.

    `chain` is optax.chain(optax.chain(momentum, stages 2 and 3), decay and scale, learning rate): its
    state is kept as it is, so that a checkpoint does not know which backend wrote it. Gradients and
    parameters are taken in their own dtypes.
    """
    recipe = settings.recipe
    beta2 = 0.0 if recipe.neuron_norm is None else recipe.neuron_norm.beta2
    mu, rate = as_schedule(recipe.momentum.momentum), as_schedule(learning_rate)

    def update(updates, state, params=None):
        (momentum, (polar, *norm)), decay, scheduled = state
        count = optax.safe_increment(momentum.count)
        rates = [mu(momentum.count), count, beta2, decay_rate(decay.count), rate(scheduled.count)]
        rates = jnp.stack([jnp.asarray(value).astype(jnp.float32) for value in rates])

        given = {path: leaf for path, _, leaf in named_leaves(updates)}
        placed = {path: place_leaf(views[path], path, specs) for path in given}
        left_out = stay_as_shards(placed, settings, specs)
        if left_out:
            rest = jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf if path in left_out else None, updates
            )
            rest, rest_state = chain.update(rest, state, params)
            (momentum, (polar, *norm)), _, _ = cast(Any, rest_state)
            updates = jax.tree.map(
                lambda made, leaf: leaf if made is None else made,
                rest,
                updates,
                is_leaf=lambda leaf: leaf is None,
            )
            placed = {path: leaf for path, leaf in placed.items() if path not in left_out}

        parameters = {path: leaf for path, _, leaf in named_leaves(params)}
        momenta = {path: leaf for path, _, leaf in named_leaves(momentum.momentum)}
        moments = _moments_by_path(norm, params)
        weights = [
            Weight(
                given[path],
                parameters[path],
                momenta[path],
                moments.get(path, ()),
                _scales(recipe, leaf.view, lr_factors.on(path)),
                _decays(leaf.view, wd_factors.on(path)),
            )
            for path, leaf in placed.items()
        ]
        leaves = list(placed.values())

        def step(weights, rates):
            return step_weights(leaves, weights, rates, settings, specs)

        if specs is None:
            stepped = step(weights, rates[None])
        else:
            lying = [_lying(*each) for each in zip(leaves, weights, strict=True)]
            stepped = run_on_mesh(
                step,
                specs,
                (weights, rates[None]),
                (lying, Axes(((), ()))),
                [Stepped(own.parameter, own.momentum, own.second_moment) for own in lying],
            )
        found = dict(zip(placed, stepped, strict=True))

        updates = _replaced(updates, {path: each.delta for path, each in found.items()})
        momenta = {path: each.momentum for path, each in found.items()}
        kept = MomentumState(count, _replaced(momentum.momentum, momenta))
        if norm:
            for path, each in found.items():
                moments[path] = each.second_moment
            norm = [norm[0]._replace(second_moment=_with_moments(params, moments))]
        decay = WeightDecayState(optax.safe_increment(decay.count))
        scheduled = scheduled._replace(count=optax.safe_increment(scheduled.count))
        return updates, ((kept, (polar, *norm)), decay, scheduled)

    return optax.GradientTransformation(chain.init, update)


def _lying(leaf: PlacedLeaf, weight: Weight) -> Weight:
    """How a weight's arrays lie on the mesh."""
    own = leaf.axes
    of_view = unfolded_axes(leaf.view, own)
    batch = Axes((*(of_view[axis] for axis in leaf.view.batch_axes), ()))
    moment = jax.tree.map(lambda x: state_axes(x.shape, leaf), weight.second_moment)
    runs = len(leaf.view.runs)
    return Weight(own, own, own, moment, (batch,) * runs, (batch,) * runs)


def _moments_by_path(norm, params) -> dict[Any, Any]:
    """The second moment of every weight, as the state keeps it."""
    if not norm:
        return {}
    parameters = unbox(params)
    kept = parameters.tree.flatten_up_to(norm[0].second_moment)
    return dict(zip(parameters.paths, kept, strict=True))


def _with_moments(params, moments: Mapping[Any, Any]):
    parameters = unbox(params)
    return parameters.tree.unflatten([moments[path] for path in parameters.paths])


def _replaced(tree, leaves: Mapping[Any, Any]):
    return jax.tree_util.tree_map_with_path(lambda path, old: leaves.get(path, old), tree)


def _scales(recipe: Recipe, view: MatrixView, lr_factor) -> tuple:
    """k lr_mul for each matrix of a run, rounded once where `lr_mul` is no JAX array."""
    return tuple(
        _each(lr_factor * shape_factor(recipe.shape_scale, run.size, view.inputs), view, run)
        for run in view.runs
    )


def _decays(view: MatrixView, wd_factor) -> tuple:
    return tuple(_each(wd_factor, view, run) for run in view.runs)


def _each(value, view: MatrixView, run: Run) -> jax.Array:
    if np.ndim(value):
        value = value.reshape(view.unfolded(value.shape))
        value = value[tuple(slice(None) if a in view.batch_axes else 0 for a in range(value.ndim))]
        value = value[..., None]
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), (*view.batch_shape, run.blocks))


def _row_major(view: MatrixView) -> tuple[int, int, int]:
    strides = view.strides()
    assert strides is not None
    return strides


def _output(array) -> Output:
    return Output(tuple(array.shape), jnp.dtype(array.dtype).name)
