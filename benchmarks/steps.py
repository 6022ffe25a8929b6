"""Whole optimizer steps: the matrices of a model, each a leaf of its own, in float32."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import optax
import torch

import optax_normuon
import torch_ref
from benchmarks.arithmetic import Rates, orthogonalization_operations, step_seconds
from benchmarks.rows import Row, measure
from benchmarks.timing import median_milliseconds, median_wall_milliseconds
from normuon_core import MatrixLayout

Stack = tuple[int, int, int]

OUT_IN = MatrixLayout(reduction_axis=-1, output_axis=-2)
DECAY = 0.1


def rows(
    models: Mapping[str, Sequence[Stack]], rates: Rates | None, *, on_gpu: bool, calls: int
) -> Iterator[Row]:
    """A row for every model and implementation."""
    for name, shapes in models.items():
        operations = sum(count * orthogonalization_operations(r, c) for count, r, c in shapes)
        for who, step in IMPLEMENTATIONS.items():
            row = Row(
                name,
                who,
                reference=None if rates is None else 1e3 * step_seconds(shapes, rates),
                operations=operations,
            )
            yield measure(row, lambda step=step, shapes=shapes: step(shapes, on_gpu, calls))


def _in_jax(make: Callable[[], optax.GradientTransformation]):
    """update and apply_updates, jitted, with parameters and state donated."""

    def prepare(shapes: Sequence[Stack], on_gpu: bool, calls: int):
        del on_gpu
        tx = make()
        key, sizes = jax.random.key(0), list(matrix_sizes(shapes))
        params = {
            f"{i:03}": 0.02 * jax.random.normal(jax.random.fold_in(key, i), size)
            for i, size in enumerate(sizes)
        }
        grads = {
            f"{i:03}": jax.random.normal(jax.random.fold_in(key, 1000 + i), size)
            for i, size in enumerate(sizes)
        }
        state = tx.init(params)

        # Parameters before state, as in the result: XLA pairs donated buffers in this order.
        def step(grads, params, state):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        compiled = jax.jit(step, donate_argnums=(1, 2)).lower(grads, params, state).compile()
        temporary = compiled.memory_analysis()
        milliseconds = median_wall_milliseconds(
            lambda carry: compiled(grads, *carry),
            (params, state),
            jax.block_until_ready,
            calls=calls,
        )
        # Not every backend tells, and a NaN would be no JSON.
        more = {"temporary GiB": temporary.temp_size_in_bytes / 2**30} if temporary else {}
        return milliseconds, more

    return prepare


def _in_torch(make: Callable[[list], torch.optim.Optimizer], *, graph: bool = False):
    def prepare(shapes: Sequence[Stack], on_gpu: bool, calls: int):
        if not on_gpu:
            raise RuntimeError("PyTorch is timed by CUDA events, and there is no CUDA device")
        params = [
            torch.nn.Parameter(0.02 * torch.randn(s, device="cuda")) for s in matrix_sizes(shapes)
        ]
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer = make(params)
        start = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        temporary = torch.cuda.max_memory_allocated() - before
        step = optimizer.step
        if graph:
            captured = torch.cuda.CUDAGraph()
            with torch.cuda.graph(captured):
                optimizer.step()
            step = captured.replay
        milliseconds = median_milliseconds(step, calls=calls)
        return milliseconds, {"temporary GiB": temporary / 2**30, "first step s": first}

    return prepare


def matrix_sizes(shapes: Sequence[Stack]) -> Iterator[tuple[int, int]]:
    for count, *size in shapes:
        yield from [(size[0], size[1])] * count


def _ours(recipe: str, backend):
    return lambda: optax_normuon.normuon(
        0.02, recipe=recipe, layout=OUT_IN, weight_decay=DECAY, backend=backend
    )


def _reference(recipe: str, backend):
    return lambda params: torch_ref.NorMuon(
        params, 0.02, recipe=recipe, layout=OUT_IN, weight_decay=DECAY, backend=backend
    )


OURS = "NorMuon, JAX, Triton"

IMPLEMENTATIONS = {
    OURS: _in_jax(_ours("normuon", "triton")),
    "NorMuon, PyTorch, Triton, graph": _in_torch(_reference("normuon", "triton"), graph=True),
    "NorMuon, PyTorch, Triton": _in_torch(_reference("normuon", "triton")),
    "Muon, JAX, Triton": _in_jax(_ours("muon", "triton")),
    "Muon, PyTorch, Triton, graph": _in_torch(_reference("muon", "triton"), graph=True),
    "NorMuon, JAX, XLA": _in_jax(_ours("normuon", "xla")),
    "optax.contrib.muon": _in_jax(lambda: optax.contrib.muon(0.02, weight_decay=DECAY)),
    "torch.optim.Muon": _in_torch(lambda params: torch.optim.Muon(params, 0.02)),
}
