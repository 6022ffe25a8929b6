"""Text from a trained model, token by token."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from examples.conversations import prompt_ids
from examples.errors import BadInput
from examples.gpt import GPTConfig, apply_model
from examples.trained import load_trained


@dataclasses.dataclass(frozen=True)
class Sample:
    """Write texts with a trained model."""

    run: tyro.conf.Positional[Path]
    """Folder of a run."""
    prompt: str = ""
    """What the text begins with, or what is asked of a model that was tuned on conversations."""
    tokens: int = 200
    """Tokens of a text at most."""
    count: int = 1
    """Texts."""
    temperature: float = 0.7
    """0 takes the likeliest token each time."""
    seed: int = 0
    """Decides the texts."""


def sample(config: Sample) -> list[str]:
    """The texts.

    Raises:
      BadInput: the folder has no trained model, or the prompt fills the context.
    """
    trained = load_trained(config.run)
    tokens = trained.tokens
    if trained.phase in ("pretrain", "ngpt"):
        prompt = [tokens.end, *tokens.encode(config.prompt)]
    else:
        prompt = prompt_ids([("user", config.prompt)], tokens)
    texts = generate(
        trained.model,
        trained.params,
        [prompt] * config.count,
        count=config.tokens,
        end=tokens.end,
        temperature=config.temperature,
        seed=config.seed,
    )
    return [tokens.decode(text) for text in texts]


def generate(
    model: GPTConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    end: int,
    temperature: float,
    seed: int,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """What follows each prompt: at most `count` tokens, until `end` or the end of the context.

    Raises:
      BadInput: a prompt fills the context.
    """
    longest = max(map(len, prompts))
    if longest >= model.context:
        raise BadInput(
            f"a prompt of {longest} tokens leaves no room in a context of {model.context}."
        )
    buffer = np.full((len(prompts), model.context), end, np.int32)
    for row, prompt in zip(buffer, prompts, strict=True):
        row[: len(prompt)] = prompt
    starts = np.array([len(prompt) for prompt in prompts], np.int32)
    written, lengths = jax.device_get(
        _writer(model, mesh)(params, buffer, starts, count, end, temperature, seed)
    )
    rows = zip(written, starts, lengths, strict=True)
    return [row[start:length].tolist() for row, start, length in rows]


@functools.cache
def _writer(model: GPTConfig, mesh: Mesh | None):
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, out_shardings=place)
    def write(params, buffer, starts, count, end, temperature, seed):
        rows = jnp.arange(len(buffer))

        def go_on(carry):
            _, _, done, _ = carry
            return ~done.all()

        def next_token(carry):
            buffer, lengths, done, key = carry
            key, own = jax.random.split(key)
            logits = apply_model(model, params, buffer)[rows, lengths - 1]
            drawn = jax.random.categorical(own, logits / jnp.maximum(temperature, 1e-6))
            token = jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(buffer.dtype)
            done = done | (token == end)
            place = jnp.minimum(lengths, model.context - 1)
            kept = jnp.where(done, buffer[rows, place], token)
            buffer = buffer.at[rows, place].set(kept)
            lengths = jnp.where(done, lengths, lengths + 1)
            done = done | (lengths - starts >= count) | (lengths >= model.context)
            return buffer, lengths, done, key

        begun = (buffer, starts, starts - starts > 0, jax.random.key(seed))
        buffer, lengths, _, _ = jax.lax.while_loop(go_on, next_token, begun)
        return buffer, lengths

    return write
