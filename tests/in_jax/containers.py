"""One set of arrays in every container that people keep parameters in."""

import dataclasses
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import FrozenDict
from jax.sharding import PartitionSpec

from optax_normuon import MatrixLayout

SHAPES = {"bias": (12,), "kernel": (6, 12), "stack": (2, 6, 12)}
"""A vector, a matrix (in, out), and two of them; every container flattens to them in this order."""

NAMES = {"bias": ("tp",), "kernel": ("fsdp", "tp"), "stack": (None, "fsdp", "tp")}
"""Over which mesh axes each is divided."""


class Named(NamedTuple):
    bias: Any
    kernel: Any
    stack: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Callable:
    """A pytree class with `__call__`, which Optax would take for a function."""

    bias: Any
    kernel: Any
    stack: Any

    def __call__(self, x):
        return x @ self.kernel + self.bias


class Module(eqx.Module):
    """As `eqx.filter` leaves one: what is no array is None."""

    bias: Any
    kernel: Any
    stack: Any
    activation: Any = None

    def __call__(self, x):
        return x @ self.kernel + self.bias


class NnxModule(nnx.Module):
    def __init__(self, arrays, **metadata):
        for name, array in arrays.items():
            own = {"out_sharding": NAMES[name], "eager_sharding": False} if metadata else {}
            setattr(self, name, nnx.Param(array, **own))


def _nnx_state(arrays, **metadata):
    return nnx.state(NnxModule(arrays, **metadata), nnx.Param)


def _haiku(arrays):
    def forward():
        for name, array in arrays.items():
            with hk.experimental.name_scope(name):
                hk.get_parameter("w", array.shape, init=lambda *_, array=array: array)

    return hk.transform(forward).init(None)


CONTAINERS = {
    "dict": dict,
    "tuple": lambda arrays: tuple(arrays.values()),
    "list in dict": lambda arrays: {"layers": list(arrays.values())},
    "NamedTuple": lambda arrays: Named(**arrays),
    "callable dataclass": lambda arrays: Callable(**arrays),
    "Equinox": lambda arrays: Module(**arrays),
    "NNX": _nnx_state,
    "NNX with partitioning": lambda arrays: _nnx_state(arrays, partitioned=True),
    "FrozenDict": FrozenDict,
    "Linen with partitioning": lambda arrays: {
        name: nn.Partitioned(array, names=NAMES[name]) for name, array in arrays.items()
    },
    "Haiku": _haiku,
    "keys with dots": lambda arrays: {f"model.{name}.weight": x for name, x in arrays.items()},
    "tuple keys": lambda arrays: {("model", name): x for name, x in arrays.items()},
    "subtree None": lambda arrays: {"a": None, "params": dict(arrays), "z": {"empty": None}},
}


def draw(container: str, seed: int, dtype=jnp.float32) -> Any:
    """The arrays of a seed in a container."""
    random = np.random.default_rng(seed)
    arrays = {
        name: jnp.asarray(random.standard_normal(shape), dtype) for name, shape in SHAPES.items()
    }
    return CONTAINERS[container](arrays)


def layouts(tree: Any) -> Any:
    """A tree of layouts of the parameters' own class."""
    return jax.tree.map(lambda leaf: None if leaf.ndim == 1 else MatrixLayout(-2, -1), tree)


def factors(tree: Any) -> Any:
    """A tree of multipliers of the parameters' own class: another one for each leaf."""
    return jax.tree.map(lambda leaf: float(leaf.ndim), tree)


def specs(tree: Any) -> Any:
    """A tree of specs of the parameters' own class."""
    by_rank = {len(shape): PartitionSpec(*NAMES[name]) for name, shape in SHAPES.items()}
    return jax.tree.map(lambda leaf: by_rank[leaf.ndim], tree)
