"""Of a batch, the sums that its loss is made of: each phase has one function.

A loss is the sum over what has weight divided by the sum of the weights, so that a batch taken in parts,
or divided over devices, has the loss and the gradient of the whole.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]
"""`loss` and `weight`, and sums of whatever else is logged: float32 scalars."""

Forward = Callable[..., jax.Array]
"""(parameters, tokens, segments or None) to logits."""


class Loss(Protocol):
    def __call__(self, forward: Forward, params: Any, frozen: Any, batch: Batch) -> Sums:
        """Sums of a batch; `frozen` are parameters that are compared with, and not trained."""
        ...


def next_token(forward: Forward, params: Any, frozen: Any, batch: Batch) -> Sums:
    """Cross-entropy of the next token, in nats.

    `batch` has `tokens` (batch, context + 1); where it has `weights` of that shape, only tokens of
    weight count as targets, and `segments` keep packed texts apart.
    """
    del frozen
    segments = batch.get("segments")
    losses = _token_losses(forward, params, batch["tokens"], segments)
    if "weights" not in batch:
        return {"loss": losses.sum(), "weight": jnp.float32(losses.size)}
    weights = batch["weights"][:, 1:].astype(jnp.float32)
    return {"loss": (losses * weights).sum(), "weight": weights.sum()}


def preference(beta: float) -> Loss:
    """DPO (arXiv 2305.18290): -log sigmoid(beta (margin of the policy - margin of the reference)).

    A margin is the log-probability of the chosen answer minus that of the rejected. `batch` has `tokens`
    and `weights` (batch, 2, context + 1), chosen first.
    """

    def loss(forward: Forward, params: Any, frozen: Any, batch: Batch) -> Sums:
        policy = _answer_log_probabilities(forward, params, batch)
        reference = _answer_log_probabilities(forward, frozen, batch)
        chosen, rejected = jnp.unstack(policy - reference, axis=-1)
        margins = beta * (chosen - rejected)
        weights = batch["weights"].any((1, 2)).astype(jnp.float32)  # rows that only fill a batch
        return {
            "loss": (weights * jax.nn.softplus(-margins)).sum(),
            "margin": (weights * margins).sum(),
            "preferred": jnp.where(margins > 0, weights, 0.0).sum(),
            "weight": weights.sum(),
        }

    return loss


def _answer_log_probabilities(forward: Forward, params: Any, batch: Batch) -> jax.Array:
    """(batch, 2): summed over the answer's tokens."""
    tokens = batch["tokens"].reshape(-1, batch["tokens"].shape[-1])
    losses = _token_losses(forward, params, tokens, None)
    weights = batch["weights"].reshape(tokens.shape)[:, 1:].astype(jnp.float32)
    return -(losses * weights).sum(-1).reshape(-1, 2)


def _token_losses(forward: Forward, params, tokens, segments) -> jax.Array:
    """(batch, context)."""
    seen = None if segments is None else segments[:, :-1]
    logits = forward(params, tokens[:, :-1], seen)
    targets = tokens[:, 1:].astype(jnp.int32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)
