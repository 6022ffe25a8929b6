"""The pretrained models that fine-tuning starts from: made once, then read from the cache."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.optimizers import compute_dtype
from examples.presets import PRETRAIN, Rates
from optax_normuon import normuon
from studies.parts.arms import adamw
from studies.training import Data, MakeOptimizer, Task, Values, to_zero, training

PRESETS = {"AdamW": PRETRAIN["adamw"], "NorMuon": PRETRAIN["normuon"]}
"""Pretraining's rates by the optimizer's name."""

FIRST_SEED = 500
"""Apart from fine-tuning's seeds."""


def bases(
    names: Sequence[str],
    task: Task,
    data: Data,
    *,
    steps: int,
    seeds: int,
    setup: str,
    cache: Path,
) -> tuple[Any, dict[str, list[float]]]:
    """Weights with two axes before each one's own, (names, seeds), float32, and the old task's losses.

    Args:
      setup: what decides a base beside its optimizer and seed; another setup is trained anew.
    """
    trained = [_cached(name, task, data, steps, seeds, setup, cache) for name in names]
    weights = jax.tree.map(lambda *each: jnp.stack(each), *(params for params, _ in trained))
    losses = {name: old for name, (_, old) in zip(names, trained, strict=True)}
    return weights, losses


def _cached(name, task, data, steps, seeds, setup, cache: Path) -> tuple[Any, list[float]]:
    template = jax.eval_shape(lambda: task.first(data, jnp.int32(0), {}))
    path = cache / f"{name}.npz"
    if path.exists():
        with np.load(path) as file:
            if str(file["setup"]) == setup:
                leaves = [jnp.asarray(file[f"leaf_{i}"]) for i in range(len(file.files) - 2)]
                return jax.tree.unflatten(jax.tree.structure(template), leaves), file[
                    "loss"
                ].tolist()
    print(f"pretraining {seeds} bases by {name}", flush=True)
    params, loss = _pretrained(task, _optimizer(PRESETS[name]), data, steps, seeds)
    cache.mkdir(parents=True, exist_ok=True)
    leaves = {f"leaf_{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(params))}
    np.savez(path, setup=np.array(setup), loss=np.array(loss), **leaves)  # pyright: ignore
    return params, loss


def _optimizer(rates: Rates) -> MakeOptimizer:
    """AdamW where one rate is given, NorMuon where two are."""

    def make(values: Values, steps: jax.Array, seed: jax.Array) -> optax.GradientTransformation:
        del values, seed
        rate = to_zero(jnp.float32(rates.learning_rate), steps)
        beside = rates.adam_learning_rate
        if beside is None:
            inner = adamw(rate, 0.0)
        else:
            inner = normuon(
                rate,
                adam_learning_rate=to_zero(jnp.float32(beside), steps),
                compute_dtype=compute_dtype(),
                backend="xla",
            )
        return optax.chain(optax.clip_by_global_norm(1.0), inner)

    return make


def _pretrained(
    task: Task, make: MakeOptimizer, data: Data, steps: int, seeds: int
) -> tuple[Any, list[float]]:
    run = training(task, make, every=steps, most=1)
    numbers = jnp.arange(FIRST_SEED, FIRST_SEED + seeds, dtype=jnp.int32)

    def side_by_side(data, numbers):
        first = jax.vmap(lambda seed: task.first(data, seed, {}))(numbers)
        return jax.vmap(lambda seed, params: run(data, seed, {}, jnp.int32(1), params))(
            numbers, first
        )

    trained = jax.jit(side_by_side)(data, numbers)
    return trained.params, trained.measured["old_loss"][:, 0].tolist()
