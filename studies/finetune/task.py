"""Pretraining of the bases, and fine-tuning of a base on answers."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.gpt import GPTConfig, apply_model, first_parameters
from optax_normuon import update_diagnostics
from studies.pretraining import next_byte_loss, random_windows
from studies.training import Data, Measured, Task, Values

RESULT = b"#### "
"""What stands before the number of an answer."""


def base_task(model: GPTConfig, batch: int) -> Task:
    """Half of each batch is the old task's text, half is prose."""

    def first(data: Data, seed: jax.Array, values: Values) -> Any:
        del data, values
        return first_parameters(model, jax.random.key(seed))

    def windows(data: Data, seed: jax.Array, step: jax.Array) -> jax.Array:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), step))
        halves = [
            random_windows(key, data[name], batch // 2, model.context + 1)
            for key, name in zip(keys, ("text", "prose"), strict=True)
        ]
        return jnp.concatenate(halves)

    def measure(data: Data, params) -> Measured:
        return {"old_loss": next_byte_loss(model, params, data["old"])}

    return Task(first, windows, lambda p, batch: next_byte_loss(model, p, batch), measure)


def answer_task(model: GPTConfig, batch: int) -> Task:
    """Fine-tuning: the loss is of answers alone. Seed i starts from base i modulo their number.

    `data["bases"]` has two axes before each weight's own: the optimizer of pretraining, which the value
    `base` chooses, and its seed.
    """

    def first(data: Data, seed: jax.Array, values: Values) -> Any:
        kind = values["base"].astype(jnp.int32)
        return jax.tree.map(lambda x: x[kind, seed % x.shape[1]], data["bases"])

    def rows(data: Data, seed: jax.Array, step: jax.Array):
        tokens, weights = data["train"]
        key = jax.random.fold_in(jax.random.key(seed), step)
        chosen = jax.random.randint(key, (batch,), 0, len(tokens))
        return tokens[chosen], weights[chosen]

    def loss(params, rows) -> jax.Array:
        return answers(model, params, *rows)["loss"]

    def measure(data: Data, params) -> Measured:
        known = answers(model, params, *data["known"])
        held_out = answers(model, params, *data["held_out"])
        return {
            **known,
            **{f"held_out_{name}": value for name, value in held_out.items()},
            "old_loss": next_byte_loss(model, params, data["old"]),
        }

    return Task(first, rows, loss, measure)


def answers(
    model: GPTConfig, params, tokens: jax.Array, weights: jax.Array
) -> dict[str, jax.Array]:
    """`loss` a byte of the answers; the share of answers that are `exact`, and whose `result` is right.

    An answer is exact if every byte of it is the likeliest one after those before it: then greedy
    sampling writes just that answer. A result is right if this holds of the bytes behind `#### `, after
    the right working.

    Args:
      tokens, weights: (rows, context + 1); weights are 1 on answers.
    """
    logits = apply_model(model, params, tokens[:, :-1])
    targets = tokens[:, 1:].astype(jnp.int32)
    asked = weights[:, 1:] > 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    right = logits.argmax(-1).astype(jnp.int32) == targets
    result = asked & _behind(tokens, RESULT)[:, 1:]
    total = jnp.maximum(asked.sum(dtype=jnp.float32), 1.0)
    return {
        "loss": jnp.where(asked, losses, 0.0).sum() / total,
        "exact": (right | ~asked).all(-1).mean(dtype=jnp.float32),
        "result": ((right | ~result).all(-1) & result.any(-1)).mean(dtype=jnp.float32),
    }


def _behind(tokens: jax.Array, sign: bytes) -> jax.Array:
    """Where tokens (rows, n) stand behind the sign's first occurrence in their row, boolean."""
    size = len(sign)
    wanted = jnp.asarray(list(sign), tokens.dtype)
    places = tokens.shape[1] - size
    found = jnp.stack([tokens[:, i : i + places] == wanted[i] for i in range(size)]).all(0)
    started = jnp.pad(jnp.cumsum(found, axis=1) > 0, [(0, 0), (size, 0)])
    return started


def update_size(tx: optax.GradientTransformation, grads, state, params) -> Measured:
    """The root mean square of what a step adds to the blocks' matrices, over all of their entries."""
    updates, _ = tx.update(grads, state, params)
    numbers = update_diagnostics(updates, params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    sizes = {jax.tree_util.keystr(path, simple=True, separator="/"): x.size for path, x in leaves}
    blocks = [path for path in numbers if path.startswith("blocks/")]
    squares = sum(jnp.square(numbers[path].update_rms).sum() * sizes[path] for path in blocks)
    return {"update_rms": jnp.sqrt(squares / sum(sizes[path] for path in blocks))}
