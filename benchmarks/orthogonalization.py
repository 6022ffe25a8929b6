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
from benchmarks.rows import Row, measure
from benchmarks.timing import median_milliseconds, median_wall_milliseconds
from normuon_core.cost import Iteration

Stack = tuple[int, int, int]


def rows(
    shapes: Sequence[Stack], rates: Rates | None, *, on_gpu: bool, calls: int
) -> Iterator[Row]:
    """A row for every shape and implementation."""
    for shape in shapes:
        count, *sides = shape
        for who, prepare in IMPLEMENTATIONS.items():
            row = Row(
                "x".join(map(str, shape)),
                who,
                reference=(
                    None if rates is None else 1e3 * orthogonalization_seconds([shape], rates)
                ),
                operations=count * orthogonalization_operations(*sides),
            )
            yield measure(row, lambda prepare=prepare, shape=shape: prepare(shape, on_gpu, calls))


def _jax(function: Callable, shape: Stack, calls: int, dtype: str) -> float:
    x = jax.random.normal(jax.random.key(0), shape, jnp.float32).astype(dtype)
    compiled = jax.jit(function)
    # Nothing depends on the last result, but a queue of calls runs one after the other.
    return median_wall_milliseconds(lambda _: compiled(x), x, jax.block_until_ready, calls=calls)


def _torch(function: Callable, shape: Stack, on_gpu: bool, calls: int, dtype: str) -> float:
    if not on_gpu:
        raise RuntimeError("PyTorch is timed by CUDA events, and there is no CUDA device")
    x = torch.randn(shape, device="cuda").to(getattr(torch, dtype))
    return median_milliseconds(lambda: function(x), calls=calls)


def _own_dtype(shape: Stack) -> str:
    """The compute dtype that "auto" takes, in which the matrices are given, so that no cast is timed."""
    _, rows, columns = shape
    _, dtype = Iteration(5).form(rows, columns)
    return dtype


def _ours_in_jax(shape: Stack, on_gpu: bool, calls: int) -> float:
    del on_gpu
    function = functools.partial(optax_normuon.polar_factor, backend="triton")
    return _jax(function, shape, calls, _own_dtype(shape))


def _ours_in_torch(shape: Stack, on_gpu: bool, calls: int) -> float:
    function = functools.partial(torch_ref.polar_factor, backend="triton")
    return _torch(function, shape, on_gpu, calls, _own_dtype(shape))


def _xla_standard(shape: Stack, on_gpu: bool, calls: int) -> float:
    del on_gpu
    function = functools.partial(optax_normuon.polar_factor, backend="xla", algorithm="standard")
    return _jax(function, shape, calls, "bfloat16")


def _xla_gram(shape: Stack, on_gpu: bool, calls: int) -> float:
    del on_gpu
    function = functools.partial(optax_normuon.polar_factor, backend="xla", algorithm="gram")
    return _jax(function, shape, calls, "float16")


def _optax(shape: Stack, on_gpu: bool, calls: int) -> float:
    """As `optax.contrib.muon` does it by default: float32, which JAX multiplies as TF32 on a GPU."""
    del on_gpu
    from optax.contrib import _muon

    coefficients = jnp.asarray(_muon._DEFAULT_NS_COEFFS)
    sides = _muon.MuonDimensionNumbers(0, 1)

    def one(x):
        return _muon.orthogonalize_via_newton_schulz(x, coefficients, dimension_numbers=sides)

    return _jax(jax.vmap(one), shape, calls, "float32")


def _torch_muon(shape: Stack, on_gpu: bool, calls: int) -> float:
    from torch.optim import _muon

    def function(x):
        return [
            _muon._zeropower_via_newtonschulz(each, (3.4445, -4.775, 2.0315), 5, 1e-7) for each in x
        ]

    return _torch(function, shape, on_gpu, calls, "bfloat16")


def _gram_newton_schulz(shape: Stack, on_gpu: bool, calls: int) -> float:
    from gram_newton_schulz import GramNewtonSchulz  # pyright: ignore[reportMissingImports]

    # It is compiled: a second shape would otherwise be taken as a dynamic one.
    torch.compiler.reset()
    return _torch(GramNewtonSchulz(), shape, on_gpu, calls, "float16")


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
