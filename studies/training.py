"""One training as a function of seed and rates alone, so that many run side by side under `vmap`."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

Data = Any
"""Arrays on the device that all trainings share."""
Values = dict[str, jax.Array]
"""The numbers of a trial by name: float32 scalars."""
Measured = dict[str, jax.Array]
"""Float32 scalars by name."""


class MakeOptimizer(Protocol):
    def __call__(
        self, values: Values, steps: jax.Array, seed: jax.Array
    ) -> optax.GradientTransformation:
        """An arm's optimizer for a training of so many steps."""
        ...


class Task(NamedTuple):
    """What is trained. Nothing here knows the arm.

    Attributes:
      first: (data, seed, values) -> the first weights.
      batch: (data, seed, step) -> the arrays of a step.
      loss: (params, batch) -> a scalar.
      measure: (data, params) -> what an evaluation says.
    """

    first: Callable[[Data, jax.Array, Values], Any]
    batch: Callable[[Data, jax.Array, jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    measure: Callable[[Data, Any], Measured]


class Trained(NamedTuple):
    """What a training comes to.

    Attributes:
      measured: by name (most,) float32. params: the last weights.
    """

    measured: Measured
    params: Any


Inspect = Callable[[optax.GradientTransformation, Any, Any, Any], Measured]
"""(optimizer, gradients, state, params) before a step -> what is measured of that step."""


def training(
    task: Task,
    make_optimizer: MakeOptimizer,
    *,
    every: int,
    most: int,
    inspect: Inspect | None = None,
):
    """A function (data, seed, values, evaluations, first weights) -> `Trained`.

    It takes `evaluations * every` steps and measures after each `every`; `evaluations` is traced, so
    that trainings of any length up to `most` evaluations share one compiled program. Entries behind the
    last evaluation are NaN.

    Args:
      inspect: measures the last step before each evaluation too, at the price of a further gradient.
    """

    def run(
        data: Data, seed: jax.Array, values: Values, evaluations: jax.Array, params: Any
    ) -> Trained:
        tx = make_optimizer(values, evaluations * every, seed)

        def gradients(params, count):
            return jax.grad(task.loss)(params, task.batch(data, seed, count))

        def step(carry, count):
            params, state = carry
            updates, state = tx.update(gradients(params, count), state, params)
            return (optax.apply_updates(params, updates), state), None

        def look(params, state, count):
            found = dict(task.measure(data, params))
            if inspect is not None:
                found |= inspect(tx, gradients(params, count), state, params)
            return {name: jnp.asarray(value, jnp.float32) for name, value in found.items()}

        def interval(i, carry):
            params, state, recorded = carry
            counts = i * every + jnp.arange(every, dtype=jnp.int32)
            (params, state), _ = jax.lax.scan(step, (params, state), counts)
            found = look(params, state, counts[-1] + 1)
            recorded = jax.tree.map(lambda all, one: all.at[i].set(one), recorded, found)
            return params, state, recorded

        state = tx.init(params)
        shapes = jax.eval_shape(look, params, state, jnp.int32(0))
        recorded = {name: jnp.full(most, jnp.nan, jnp.float32) for name in shapes}
        params, _, recorded = jax.lax.fori_loop(0, evaluations, interval, (params, state, recorded))
        return Trained(recorded, params)

    return run


def to_zero(peak: jax.Array, steps: jax.Array, *, warmup: float = 0.05) -> optax.Schedule:
    """Linear warmup over that fraction of the steps, then linear decay to zero behind the last step.

    Args:
      peak, steps: may be traced.
    """

    def rate(count):
        done = jnp.asarray(count, jnp.float32)
        total = jnp.asarray(steps, jnp.float32)
        rising = (done + 1) / jnp.maximum(1.0, warmup * total)
        falling = (total - done) / jnp.maximum(1.0, (1 - warmup) * total)
        return peak * jnp.clip(jnp.minimum(rising, falling), 0.0, 1.0)

    return rate
