"""Updates at every k-th step only, by the mean of the gradients since the last one."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_normuon.leaves.precision import map_updates


class EveryStepsState(NamedTuple):
    """The state of `every_steps`.

    Attributes:
      count: steps done, int32.
      gradient_sum: of the steps since the last update, a tree like the parameters.
      direction, increment: of the transformations inside.
    """

    count: jax.Array
    gradient_sum: optax.Updates
    direction: optax.OptState
    increment: optax.OptState


def every_steps(
    every: int, direction: optax.GradientTransformation, increment: optax.GradientTransformation
) -> optax.GradientTransformation:
    """`optax.chain(direction, increment)` at the k-th, 2k-th, ... step, and a zero update between them.

    It differs from `optax.MultiSteps` in what counts: `direction` counts the updates that it makes, as
    Adam's bias correction wants, and `increment` all steps, as schedules of rates want. Between the
    updates one sum is all that is computed. A leaf without gradient keeps its sum, and its state.

    Args:
      every: k, at least 1.
      direction: without use of the parameters. increment: with counters alone as its state.
    """

    def init(params: optax.Params) -> EveryStepsState:
        return EveryStepsState(
            jnp.zeros([], jnp.int32),
            jax.tree.map(jnp.zeros_like, params),
            direction.init(params),
            increment.init(params),
        )

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, EveryStepsState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        sums = map_updates(lambda g, total: total + g, updates, state.gradient_sum)

        def step(sums: optax.Updates):
            means = map_updates(lambda total: total / jnp.asarray(every, total.dtype), sums)
            directions, moved = direction.update(means, state.direction, params)
            increments, counted = increment.update(directions, state.increment, params)
            return increments, map_updates(jnp.zeros_like, sums), moved, counted

        def wait(sums: optax.Updates):
            zeros = map_updates(jnp.zeros_like, sums)
            # For the counters: the compiler drops what nothing reads.
            _, counted = increment.update(zeros, state.increment, params)
            return zeros, sums, state.direction, counted

        increments, sums, moved, counted = jax.lax.cond(count % every == 0, step, wait, sums)
        kept = jax.tree.map(
            lambda new, old: old if new is None else new,
            *(sums, state.gradient_sum),
            is_leaf=lambda leaf: leaf is None,
        )
        return increments, EveryStepsState(count, kept, moved, counted)

    return optax.GradientTransformation(init, update)
