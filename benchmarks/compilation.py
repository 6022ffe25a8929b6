"""How long a jitted step takes to compile, with many layers that are not stacked."""

import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import optax

import optax_normuon
from benchmarks.race import Race
from benchmarks.rows import Row, measure
from benchmarks.workloads import OUT_IN

OPTIMIZERS = {
    "optax.adamw": lambda: optax.adamw(1e-3),
    "ours": lambda: optax_normuon.normuon(0.02, layout=OUT_IN, weight_decay=0.1),
    "ours, XLA": lambda: optax_normuon.normuon(
        0.02, layout=OUT_IN, weight_decay=0.1, backend="xla"
    ),
    "optax.contrib.muon": lambda: optax.contrib.muon(0.02, weight_decay=0.1),
}


def races(layers: int, layer: Sequence[tuple[int, int]]) -> Iterator[Race]:
    """Milliseconds of tracing, lowering and compiling; the seconds of the first call beside them."""
    for who, make in OPTIMIZERS.items():
        row = Row(f"{layers} layers of {len(layer)} matrices", who)
        measure(row, lambda make=make: _compile(make(), layers, layer))
        yield Race(who, [row])


def _compile(tx: optax.GradientTransformation, layers: int, layer):
    params = {
        f"layer{i:03}": {str(j): jnp.ones(size) for j, size in enumerate(layer)}
        for i in range(layers)
    }
    state = tx.init(params)

    def step(grads, params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(1, 2)).lower(params, params, state).compile()
    compiling = time.perf_counter() - start
    grads = jax.tree.map(jnp.zeros_like, params)
    start = time.perf_counter()
    jax.block_until_ready(compiled(grads, params, state))
    return 1e3 * compiling, {"first call s": time.perf_counter() - start}
