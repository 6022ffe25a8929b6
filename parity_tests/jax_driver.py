"""The weights of a trace through `optax_normuon`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

import optax_normuon
from parity_tests.traces import Trace, Weight
from parity_tests.trajectory import Trajectory, block_by_block


def run_jax(
    trace: Trace, *, dtype: DTypeLike = np.float64, compute_dtype: DTypeLike | None = None
) -> dict[str, Trajectory]:
    """Trains every weight of the trace on its gradients, learning rates and momenta, by name.

    Args:
      dtype: of parameters and gradients. compute_dtype: None is `dtype`.
    """
    result = {}
    waiting = list(trace.weights)
    while waiting:
        together = [weight for weight in waiting if weight.recipe == waiting[0].recipe]
        waiting = [weight for weight in waiting if weight.recipe != waiting[0].recipe]
        result |= _train(together, trace, dtype, compute_dtype or dtype)
    return result


def _train(weights: list[Weight], trace: Trace, dtype, compute_dtype) -> dict[str, Trajectory]:
    rates, momenta = jnp.asarray(trace.lr, dtype), jnp.asarray(trace.mu, dtype)
    tx = optax_normuon.normuon(
        lambda count: rates[count],
        recipe=weights[0].recipe,
        weight_decay=trace.weight_decay,
        momentum=lambda count: momenta[count],
        layout={weight.name: weight.layout for weight in weights},
        lr_mul={weight.name: weight.lr_mul for weight in weights},
        wd_mul={weight.name: weight.wd_mul for weight in weights},
        compute_dtype=compute_dtype,
    )

    @jax.jit
    def train(params, grads):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            kept = [optax.tree.get(state, key) for key in ("momentum", "second_moment")]
            return (params, state), (params, *kept)

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    layouts = {weight.name: weight.layout for weight in weights}
    start = {weight.name: jnp.asarray(weight.params[0], dtype) for weight in weights}
    grads = {weight.name: jnp.asarray(weight.grads, dtype) for weight in weights}
    params, momentum, second = jax.device_get(train(start, grads))
    return {
        name: Trajectory(
            np.concatenate([start[name][None], params[name]]),
            momentum[name][-1],
            {}
            if second is None
            else {
                step + 1: block_by_block(
                    jax.tree.map(lambda x, step=step: x[step], second[name]),
                    layouts[name],
                    start[name].shape,
                )
                for step in range(len(trace.lr))
            },
        )
        for name in start
    }
