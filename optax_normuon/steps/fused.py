"""JAX arrays through `normuon_core.fused_step`: the step of matrices by kernels.

All arithmetic of a step is in the kernels that PyTorch runs as well, in the same order. State and
updates are those of the chain of transformations that the kernels stand for.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normuon_core.fused_step import StackStep
from normuon_core.kernels.pieces import Leaf, Piece
from normuon_core.kernels.source import RATES
from normuon_core.layout import MatrixView, Run
from normuon_core.recipes import Recipe
from normuon_core.shape_rules import shape_factor
from optax_normuon.kernels import launcher
from optax_normuon.kernels.engine import Kernels, left_to_xla
from optax_normuon.leaves.boxes import unbox
from optax_normuon.leaves.layout import Views
from optax_normuon.leaves.multipliers import Multiplier, Multipliers
from optax_normuon.leaves.parameters import require_params
from optax_normuon.leaves.paths import KeyPath, named_leaves
from optax_normuon.leaves.precision import as_schedule
from optax_normuon.matrices.plan import PlannedStack, plan
from optax_normuon.matrices.views import LeafStatistic
from optax_normuon.matrices.waves import one_by_one_and_waves
from optax_normuon.mesh.collectives import run_on_mesh
from optax_normuon.mesh.leaf_on_mesh import LeafOnMesh, leaf_on_mesh
from optax_normuon.mesh.owners import Owners
from optax_normuon.mesh.specs import MeshAxes, Specs
from optax_normuon.stages.chain import ChainState
from optax_normuon.stages.momentum import MomentumState
from optax_normuon.stages.neuron_norm import NeuronNormState
from optax_normuon.stages.weight_decay import WeightDecayState
from optax_normuon.steps.exchange import Exchange
from optax_normuon.steps.in_place import has_stepped, may_step
from optax_normuon.steps.weights import LaidOut, Stepped, Weight, mesh_axes_of, with_leading_batch


def step_weights(
    leaves: Sequence[LeafOnMesh],
    weights: Sequence[Weight[jax.Array]],
    rates: jax.Array,
    engine: Kernels,
    specs: Specs | None = None,
    *,
    adds: Sequence[bool],
) -> list[Stepped[jax.Array]]:
    """Runs all stages on all weights. `jax.vmap` gives the weights one more batch axis.

    Args:
      leaves: how the weights lie.
      weights: their arrays; on a mesh one device's parts of them.
      rates: (runs, `source.RATES`) float32: one row for each of as many equal runs of a weight's
        matrices.
      adds: for each weight whether its step is added to the parameter.
    """

    @jax.custom_batching.custom_vmap
    def step(weights, rates):
        return _step_weights(leaves, weights, rates.reshape(-1, RATES), engine, specs, adds)

    @step.def_vmap
    def _(axis_size, in_batched, weights, rates):
        weights, rates = jax.tree.map(
            lambda x, batched: x if batched else jnp.broadcast_to(x, (axis_size, *x.shape)),
            (weights, rates),
            tuple(in_batched),
        )
        wider = [
            leaf._replace(
                view=with_leading_batch(leaf.view, axis_size),
                local=with_leading_batch(leaf.local, axis_size),
            )
            for leaf in leaves
        ]
        rates = rates.reshape(-1, RATES)
        result = step_weights(wider, weights, rates, engine, specs, adds=adds)
        return result, jax.tree.map(lambda _: True, result)

    return step(list(weights), rates)


def _step_weights(
    leaves: Sequence[LeafOnMesh],
    weights: Sequence[Weight[jax.Array]],
    rates: jax.Array,
    engine: Kernels,
    specs: Specs | None,
    adds: Sequence[bool],
) -> list[Stepped[jax.Array]]:
    laid_out = [
        LaidOut(leaf, weight, rates, engine.recipe, adds=own)
        for leaf, weight, own in zip(leaves, weights, adds, strict=True)
    ]
    dtypes = {i: weight.gradient.dtype for i, weight in enumerate(weights)}
    stacks = plan(dict(enumerate(leaves)), dtypes, engine, specs, ceiling=engine.ceiling)
    done: list[Leaf] = []
    for wave in one_by_one_and_waves(_in_order(stacks)):
        steps = [_stack_step(stack, laid_out, engine, specs) for stack in wave]
        if steps[0].exchange is not None:
            _wait_for_the_last_but_one([step.pieces[0].block.leaf for step in steps], done)
        for part in (StackStep.start, StackStep.orthogonalize):
            for step in steps:
                part(step)
            _wait_for_each_other(steps)
        for step in steps:
            step.bring_back()
            step.finish()
        done += [step.pieces[-1].block.leaf for step in steps]
    return [weight.stepped() for weight in laid_out]


def _stack_step(
    stack: PlannedStack[int], weights: Sequence[LaidOut], engine: Kernels, specs: Specs | None
) -> StackStep:
    """The step of one stack, with its exchange where its matrices have owners."""
    placement, sharding = stack.placement, stack.key.sharding
    assert placement.form is not None
    assert placement.dtype is not None
    pieces = [
        Piece(weights[each.leaf].blocks[each.run], each.start, each.stop - each.start)
        for each in stack.pieces
    ]
    exchange = None
    if specs is not None and sharding is not None and placement.strategy == "owners":
        exchange = Exchange(Owners.of(sharding, specs, stack.deal), pieces[0].block.geometry)
    return StackStep(
        launcher.launch,
        launcher.describe_device(),
        pieces,
        engine.recipe,
        form=placement.form,
        dtype=placement.dtype,
        exchange=exchange,
    )


def _in_order(stacks: Sequence[PlannedStack[int]]) -> list[PlannedStack[int]]:
    """The order in which stacks are stepped: the smallest group first, the second smallest last.

    A stack travels while another is worked on. Before the first and after the last there is no other.
    """
    groups = [list(group) for _, group in groupby(stacks, key=lambda stack: stack.key)]
    ascending = sorted(groups, key=lambda g: g[0].key.rows * g[0].key.columns * g[0].group_size)
    return [stack for g in (*ascending[:1], *ascending[2:], *ascending[1:2]) for stack in g]


def _wait_for_the_last_but_one(leaves: Sequence[Leaf], done: Sequence[Leaf]) -> None:
    """Lets one stack travel while another is worked on, and keeps more of them out of memory."""
    if len(done) < 2:
        return
    before = done[-2]
    for leaf in leaves:
        if leaf is not before:
            waiting = (leaf.gradient, before.result)
            leaf.gradient, before.result = jax.lax.optimization_barrier(waiting)


def _wait_for_each_other(steps: Sequence[StackStep]) -> None:
    """Holds the stacks of a wave to one stage: see `matrices.waves`."""
    if len(steps) > 1:
        together = jax.lax.optimization_barrier([step.x for step in steps])
        for step, x in zip(steps, together, strict=True):
            step.x = x


def with_kernels(
    chain: optax.GradientTransformation,
    engine: Kernels,
    *,
    views: Views,
    specs: Specs | None,
    learning_rate: optax.ScalarOrSchedule,
    decay_rate: optax.Schedule,
    lr_factors: Multipliers,
    wd_factors: Multipliers,
) -> optax.GradientTransformation:
    """The chain of a recipe's stages for matrices, with its update made by the kernels.

    The state is the chain's own, so that a checkpoint does not depend on the backend. Gradients and
    parameters are taken in their own dtypes.

    Args:
      chain: a `chain_of_stages`. It steps the leaves that no kernel steps.
      views: of all leaves that hold matrices.
      decay_rate: what multiplies the weights in stage 4, `wd_factors` aside.
      lr_factors, wd_factors: of the leaves.
    """
    recipe = engine.recipe
    beta2 = 0.0 if recipe.neuron_norm is None else recipe.neuron_norm.beta2
    mu, rate = as_schedule(recipe.momentum.momentum), as_schedule(learning_rate)

    def update(
        updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        params = require_params(params)
        before = ChainState.of(state)
        count = optax.safe_increment(before.momentum.count)
        rates = [
            mu(before.momentum.count),
            count,
            beta2,
            decay_rate(before.decay.count),
            rate(before.rate.count),
        ]
        rates = jnp.stack([jnp.asarray(value).astype(jnp.float32) for value in rates])

        given = {path: leaf for path, _, leaf in named_leaves(updates)}
        dtypes = {path: leaf.dtype for path, leaf in given.items()}
        on_mesh = {path: leaf_on_mesh(views[path], path, specs) for path in given}
        left_out = left_to_xla(on_mesh, dtypes, engine, specs)
        kept = before
        if left_out:
            rest = jax.tree_util.tree_map_with_path(
                lambda path, leaf: leaf if path in left_out else None, updates
            )
            rest, rest_state = chain.update(rest, state, params)
            kept = ChainState.of(rest_state)
            updates = jax.tree.map(
                lambda made, leaf: leaf if made is None else made,
                rest,
                updates,
                is_leaf=lambda leaf: leaf is None,
            )
            on_mesh = {path: leaf for path, leaf in on_mesh.items() if path not in left_out}

        parameters = {path: leaf for path, _, leaf in named_leaves(params)}
        momenta = {path: leaf for path, _, leaf in named_leaves(kept.momentum.momentum)}
        moments = _moments_by_path(kept.norm, params)
        weights = [
            Weight(
                given[path],
                parameters[path],
                momenta[path],
                moments.get(path, ()),
                _scales(recipe, leaf.view, lr_factors.on(path)),
                _decays(leaf.view, wd_factors.on(path)),
            )
            for path, leaf in on_mesh.items()
        ]
        leaves = list(on_mesh.values())
        adds = [may_step(parameters[path]) for path in on_mesh]

        def step(weights: list[Weight[jax.Array]], rates: jax.Array) -> list[Stepped[jax.Array]]:
            return step_weights(leaves, weights, rates, engine, specs, adds=adds)

        if specs is None:
            stepped = step(weights, rates[None])
        else:
            axes = [mesh_axes_of(*each) for each in zip(leaves, weights, strict=True)]
            stepped = run_on_mesh(
                step,
                specs,
                (weights, rates[None]),
                (axes, MeshAxes(((), ()))),
                [Stepped(own.parameter, own.momentum, own.second_moment) for own in axes],
            )
        found = dict(zip(on_mesh, stepped, strict=True))
        for path, added in zip(on_mesh, adds, strict=True):
            if added:
                has_stepped(parameters[path])

        updates = _replaced(updates, {path: each.result for path, each in found.items()})
        momenta = {path: each.momentum for path, each in found.items()}
        if kept.norm is not None:
            moments |= {path: each.second_moment for path, each in found.items()}
            kept = kept._replace(norm=NeuronNormState(_with_moments(params, moments)))
        after = kept._replace(
            momentum=MomentumState(count, _replaced(kept.momentum.momentum, momenta)),
            decay=WeightDecayState(optax.safe_increment(before.decay.count)),
            rate=before.rate._replace(count=optax.safe_increment(before.rate.count)),
        )
        return updates, after.as_state()

    return optax.GradientTransformation(chain.init, update)


def _moments_by_path(
    norm: NeuronNormState | None, params: optax.Params
) -> dict[KeyPath, LeafStatistic]:
    """The second moment of every weight, as the state keeps it."""
    if norm is None:
        return {}
    parameters = unbox(params)
    kept = parameters.tree.flatten_up_to(norm.second_moment)
    return dict(zip(parameters.paths, kept, strict=True))


def _with_moments(params: optax.Params, moments: Mapping[KeyPath, LeafStatistic]) -> optax.Params:
    """The inverse of `_moments_by_path`: a tree like the parameters, without their boxes."""
    parameters = unbox(params)
    return parameters.tree.unflatten([moments[path] for path in parameters.paths])


def _replaced(tree: optax.Params, leaves: Mapping[KeyPath, jax.Array]) -> optax.Params:
    """The tree with some of its leaves replaced."""
    return jax.tree_util.tree_map_with_path(lambda path, old: leaves.get(path, old), tree)


def _scales(recipe: Recipe, view: MatrixView, lr_factor: Multiplier) -> tuple[jax.Array, ...]:
    """The shape's factor times `lr_mul`, for each matrix of each run.

    Of a number or a NumPy array the product is taken in double precision, and rounded once.
    """
    return tuple(
        _each(lr_factor * shape_factor(recipe.shape_scale, run.size, view.inputs), view, run)
        for run in view.runs
    )


def _decays(view: MatrixView, wd_factor: Multiplier) -> tuple[jax.Array, ...]:
    """`wd_mul` for each matrix of each run."""
    return tuple(_each(wd_factor, view, run) for run in view.runs)


def _each(value: Multiplier, view: MatrixView, run: Run) -> jax.Array:
    """A leaf's factor for each matrix of a run: over the batch axes and then the blocks, float32."""
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        value = value.reshape(view.unfolded(value.shape))
        value = value[tuple(slice(None) if a in view.batch_axes else 0 for a in range(value.ndim))]
        value = value[..., None]
    return jnp.broadcast_to(jnp.asarray(value, jnp.float32), (*view.batch_shape, run.blocks))
