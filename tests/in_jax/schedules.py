"""What the tests of schedules and of multipliers share."""

from typing import Any

import optax

from tests.in_jax.contract import LEAVES, draw

STACK, VECTOR, MATRIX = LEAVES


def run(tx, steps=2) -> Any:
    """Parameters after some steps on fixed gradients, and the state."""
    params = draw(0)
    state = tx.init(params)
    for seed in range(1, steps + 1):
        updates, state = tx.update(draw(seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state
