"""Orthogonalization of stacks of matrices: ours against the peers'."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import torch

import optax_normuon
import torch_ref
from benchmarks.arithmetic import (
    Rates,
    orthogonalization_operations,
    orthogonalization_seconds,
)
from benchmarks.race import Pace, Prepared, Race, race
from benchmarks.rows import Row
from benchmarks.workloads import Stack
from normuon_core.cost import Iteration


def races(shapes: Sequence[Stack], rates: Rates | None, pace: Pace) -> Iterator[Race]:
    """One for every shape."""
    for shape in shapes:
        count, *sides = shape
        what = "x".join(map(str, shape))
        reference = None if rates is None else 1e3 * orthogonalization_seconds([shape], rates)
        operations = count * orthogonalization_operations(*sides)
        rows = [
            Row(what, who, base=OURS, reference=reference, operations=operations)
            for who in IMPLEMENTATIONS
        ]
        prepare = {
            who: functools.partial(implementation, shape)
            for who, implementation in IMPLEMENTATIONS.items()
        }
        yield race(what, rows, prepare, pace, peers=PEERS)


def by_jax(function: Callable, shape: Stack, dtype: str) -> Prepared:
    """A function of a stack of random matrices, compiled."""
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
    compiled = jax.jit(function).lower(x).compile()
    last = x

    # Nothing depends on the last result, but a queue of calls runs one after the other.
    def run():
        nonlocal last
        last = compiled(x)

    return Prepared(run, lambda: jax.block_until_ready(last))


def _torch(function: Callable, shape: Stack, dtype: str) -> Prepared:
    on_gpu = torch.cuda.is_available()
    x = torch.randn(shape, device="cuda" if on_gpu else "cpu").to(getattr(torch, dtype))
    return Prepared(lambda: function(x), torch.cuda.synchronize if on_gpu else lambda: None)


def _own_dtype(shape: Stack) -> str:
    """The compute dtype that "auto" takes, in which the matrices are given, so that no cast is timed."""
    _, rows, columns = shape
    _, dtype = Iteration(5).form(rows, columns)
    return dtype


def _ours_in_jax(shape: Stack) -> Prepared:
    function = functools.partial(optax_normuon.polar_factor, backend="triton")
    return by_jax(function, shape, _own_dtype(shape))


def _ours_in_torch(shape: Stack) -> Prepared:
    function = functools.partial(torch_ref.polar_factor, backend="triton")
    return _torch(function, shape, _own_dtype(shape))


def _xla_standard(shape: Stack) -> Prepared:
    function = functools.partial(optax_normuon.polar_factor, backend="xla", algorithm="standard")
    return by_jax(function, shape, "bfloat16")


def _xla_gram(shape: Stack) -> Prepared:
    function = functools.partial(optax_normuon.polar_factor, backend="xla", algorithm="gram")
    return by_jax(function, shape, "float16")


def _optax(shape: Stack) -> Prepared:
    """As `optax.contrib.muon` does it by default: float32, which JAX multiplies as TF32 on a GPU."""
    from optax.contrib import _muon

    coefficients = jnp.asarray(_muon._DEFAULT_NS_COEFFS)
    sides = _muon.MuonDimensionNumbers(0, 1)

    def one(x):
        return _muon.orthogonalize_via_newton_schulz(x, coefficients, dimension_numbers=sides)

    return by_jax(jax.vmap(one), shape, "float32")


def _torch_muon(shape: Stack) -> Prepared:
    from torch.optim import _muon

    def function(x):
        return [
            _muon._zeropower_via_newtonschulz(each, (3.4445, -4.775, 2.0315), 5, 1e-7) for each in x
        ]

    return _torch(function, shape, "bfloat16")


def _gram_newton_schulz(shape: Stack) -> Prepared:
    from gram_newton_schulz import GramNewtonSchulz  # pyright: ignore[reportMissingImports]

    # It is compiled: a second shape would otherwise be taken as a dynamic one.
    torch.compiler.reset()
    return _torch(GramNewtonSchulz(), shape, "float16")


OURS = "ours, JAX, Triton"

IMPLEMENTATIONS = {
    OURS: _ours_in_jax,
    "ours, PyTorch, Triton": _ours_in_torch,
    "ours, JAX, XLA, standard": _xla_standard,
    "ours, JAX, XLA, Gram": _xla_gram,
    "optax.contrib.muon": _optax,
    "torch.optim.Muon": _torch_muon,
    "gram-newton-schulz": _gram_newton_schulz,
}
PEERS = ("optax.contrib.muon", "torch.optim.Muon", "gram-newton-schulz")
