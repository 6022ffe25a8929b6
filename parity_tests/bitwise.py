"""The same training in JAX and in PyTorch, for comparisons bit by bit (tier T3)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import optax_normuon
from normuon_core import MatrixLayout
from optax_normuon.kernels.backend import Backend as JaxBackend
from torch_ref import NorMuon
from torch_ref.kernels.backend import Backend as TorchBackend
from torch_ref.matrices.state import second_moments

Shapes = Mapping[str, tuple[tuple[int, ...], MatrixLayout]]


class Outcome(NamedTuple):
    """Every array of one weight after training, as NumPy arrays of its own dtype."""

    arrays: dict[str, np.ndarray]


class Training(NamedTuple):
    """What is trained, and how.

    Attributes:
      shapes: shape and layout of every weight, by name.
      start: initial values, float32. gradients: a pool for each weight, (draws, *shape) float32; step
        t takes draw t modulo their number, times a power of two that changes.
      dtype: of parameters and gradients. remainder: whether bfloat16 parameters keep one.
      keywords: for both optimizers.
    """

    shapes: Shapes
    start: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    steps: int
    dtype: str
    remainder: bool
    keywords: dict[str, Any]

    def gradient(self, name: str, step: int) -> np.ndarray:
        pool = self.gradients[name]
        return pool[step % len(pool)] * np.float32(2.0 ** (step % 5 - 2))


def train_jax(training: Training, *, backend: JaxBackend) -> dict[str, Outcome]:
    layout = {name: layout for name, (_, layout) in training.shapes.items()}
    tx = optax_normuon.normuon(0.02, layout=layout, backend=backend, **training.keywords)
    if training.remainder:
        tx = optax_normuon.with_bf16_remainder(tx)
    params = {name: jnp.asarray(x, training.dtype) for name, x in training.start.items()}
    state = tx.init(params)

    @jax.jit
    def step(grads, state, params):
        updates, state = tx.update(grads, state, params)
        # bfloat16 parameters with a remainder get float32 updates.
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    for t in range(training.steps):
        grads = {n: jnp.asarray(training.gradient(n, t), training.dtype) for n in params}
        params, state = step(grads, state, params)
    kept = {
        "parameter": params,
        "momentum": optax.tree.get(state, "momentum"),
        "second moment": optax.tree.get(state, "second_moment"),
        "remainder": optax.tree.get(state, "remainder"),
    }
    return {
        name: Outcome({key: _flat(tree[name]) for key, tree in kept.items() if tree is not None})
        for name in params
    }


def train_torch(training: Training, *, backend: TorchBackend, device: str) -> dict[str, Outcome]:
    dtype = getattr(torch, training.dtype)
    params = {
        name: torch.nn.Parameter(torch.tensor(x, device=device).to(dtype))
        for name, x in training.start.items()
    }
    groups = [
        {"params": [param], "layout": training.shapes[name][1]} for name, param in params.items()
    ]
    optimizer = NorMuon(
        groups, 0.02, backend=backend, bf16_remainder=training.remainder, **training.keywords
    )
    for t in range(training.steps):
        for name, param in params.items():
            param.grad = torch.tensor(training.gradient(name, t), device=device).to(dtype)
        optimizer.step()
    result = {}
    for name, param in params.items():
        state = optimizer.state[param]
        kept = {"parameter": param.detach(), "momentum": state["momentum"]}
        if moments := second_moments(state):
            kept["second moment"] = moments
        if "remainder" in state:
            kept["remainder"] = state["remainder"]
        result[name] = Outcome({key: _flat(value) for key, value in kept.items()})
    return result


def _flat(value) -> np.ndarray:
    """One array, or the blocks of a split weight, end to end."""
    if isinstance(value, list | tuple):
        return np.concatenate([_flat(each).ravel() for each in value])
    if isinstance(value, torch.Tensor):
        value = value.cpu()
        if value.dtype == torch.bfloat16:
            return value.view(torch.int16).numpy().view(jnp.bfloat16)
        return value.numpy()
    return np.asarray(value)


def different_bits(a: dict[str, Outcome], b: dict[str, Outcome]) -> dict[str, int]:
    """How many entries of each array differ in any bit; equal ones are left out."""
    found = {}
    for name in a:
        for key, array in a[name].arrays.items():
            other = b[name].arrays[key]
            assert array.dtype == other.dtype, (name, key, array.dtype, other.dtype)
            unsigned = f"u{array.dtype.itemsize}"
            count = np.count_nonzero(array.view(unsigned).ravel() != other.view(unsigned).ravel())
            if count:
                found[f"{name}, {key}"] = int(count)
    return found
