"""The task of pretraining: the next byte of Python's standard library, by the example GPT."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from examples.corpus import load_corpus
from examples.gpt import GPTConfig, apply_model, first_parameters
from studies.training import Data, Task, Values


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """Model, batches and length.

    Attributes:
      every: steps between two evaluations. evaluations: how many there are in the full length.
      held_out: windows that an evaluation is taken over.
    """

    model: GPTConfig
    batch: int
    every: int
    evaluations: int
    held_out: int

    @property
    def steps(self) -> int:
        return self.every * self.evaluations

    def __str__(self) -> str:
        model = self.model
        return (
            f"{model.width} x {model.depth}, context {model.context}, batch {self.batch},"
            f" {self.steps} steps, {model.dtype}"
        )


def text(setup: Pretraining) -> Data:
    """On the device: `train` (tokens,) uint8, and `held_out` (windows, context + 1) uint8."""
    corpus = load_corpus()
    windows = corpus.validation_windows(count=setup.held_out, context=setup.model.context)
    return {"train": jnp.asarray(corpus.train.parts[0]), "held_out": jnp.asarray(windows)}


def pretraining(setup: Pretraining) -> Task:
    """First weights and batches follow from the seed alone."""

    def first(data: Data, seed: jax.Array, values: Values) -> Any:
        del data, values
        return first_parameters(setup.model, jax.random.key(seed))

    def batch(data: Data, seed: jax.Array, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), step)
        return random_windows(key, data["train"], setup.batch, setup.model.context + 1)

    def loss(params, windows: jax.Array) -> jax.Array:
        return next_byte_loss(setup.model, params, windows)

    def measure(data: Data, params) -> dict[str, jax.Array]:
        return {"loss": loss(params, data["held_out"])}

    return Task(first, batch, loss, measure)


def random_windows(key: jax.Array, tokens: jax.Array, count: int, size: int) -> jax.Array:
    """(count, size) of `tokens` (n,), each at a place as likely as any other."""
    starts = jax.random.randint(key, (count, 1), 0, len(tokens) - size + 1)
    return tokens[starts + jnp.arange(size, dtype=starts.dtype)[None]]


def next_byte_loss(model: GPTConfig, params, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats a byte.

    Args:
      windows: (batch, context + 1), an integer dtype.
    """
    logits = apply_model(model, params, windows[:, :-1])
    targets = windows[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
