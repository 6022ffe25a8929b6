"""Optimizer steps in JAX, jitted, with parameters and state donated."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import optax

import optax_normuon
from benchmarks.race import Prepared
from benchmarks.workloads import DECAY, OUT_IN, RATE, Stack, matrix_sizes


class Matrices:
    """A model's gradients, which all steps share, and parameters, which each has of its own."""

    def __init__(self, shapes: Sequence[Stack]):
        self._sizes = list(matrix_sizes(shapes))

    def params(self) -> dict[str, jax.Array]:
        return self._draw(seed=0, scale=0.02)

    @functools.cached_property
    def grads(self) -> dict[str, jax.Array]:
        return self._draw(seed=1, scale=1.0)

    def _draw(self, *, seed: int, scale: float) -> dict[str, jax.Array]:
        key = jax.random.key(seed)
        return {
            f"{i:03}": scale * jax.random.normal(jax.random.fold_in(key, i), size)
            for i, size in enumerate(self._sizes)
        }


MakeTransformation = Callable[[], optax.GradientTransformation]
Step = Callable[[Matrices], Prepared]


def update(make: MakeTransformation) -> Step:
    """The step that every Optax user writes: `update`, then `apply_updates`."""

    def step(tx, grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return _compiled(make, step)


def apply(make: MakeTransformation) -> Step:
    """`optax_normuon.apply`: new parameters and state from one call."""
    return _compiled(make, apply_once)


def apply_once(tx, grads, params, state):
    """One such step, its arguments in the order of the other's."""
    return optax_normuon.apply(tx, grads, state, params)


def _compiled(make: MakeTransformation, step) -> Step:
    def prepare(matrices: Matrices) -> Prepared:
        tx, params, grads = make(), matrices.params(), matrices.grads
        state = tx.init(params)
        start = time.perf_counter()
        # Parameters before state, as in the result: XLA pairs donated buffers in this order.
        jitted = jax.jit(functools.partial(step, tx), donate_argnums=(1, 2))
        compiled = jitted.lower(grads, params, state).compile()
        more = {"compilation s": time.perf_counter() - start}
        # Not every backend tells.
        if (memory := compiled.memory_analysis()) is not None:
            more["temporary GiB"] = memory.temp_size_in_bytes / 2**30
        carry = params, state

        def run():
            nonlocal carry
            carry = compiled(grads, *carry)

        return Prepared(run, lambda: jax.block_until_ready(carry), more)

    return prepare


def normuon(recipe: str, backend: Literal["triton", "xla"]) -> MakeTransformation:
    """One of our recipes."""
    return lambda: optax_normuon.normuon(
        RATE, recipe=recipe, layout=OUT_IN, weight_decay=DECAY, backend=backend
    )


def optax_muon() -> optax.GradientTransformation:
    """Optax's own, with its defaults."""
    return optax.contrib.muon(RATE, weight_decay=DECAY)
