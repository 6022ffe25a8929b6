"""The published sets of polynomials: the time of a whole orthogonalization, and its error.

Which is the fastest at the accuracy of `newton_schulz`? The one with the least time among the rows whose
`error` is 1 or less: the largest ratio of a set's error to that of `newton_schulz` on the same spectrum.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import torch

import optax_normuon
import torch_ref
from benchmarks.captured import Captured
from benchmarks.orthogonalization import by_jax
from benchmarks.polar_errors import (
    BASE,
    CONTESTANTS,
    Contestant,
    Problem,
    errors,
    in_jax,
    over,
    problems,
)
from benchmarks.race import Pace, Prepared, Race, race
from benchmarks.rows import Row
from benchmarks.workloads import Stack
from normuon_core.cost import Algorithm, Form, Iteration, operations
from normuon_core.polynomials import cubic_steps


class Engine(NamedTuple):
    """What multiplies, and in which form: "auto" is bfloat16 or the Gram form in float16."""

    by_kernels: bool
    algorithm: Algorithm

    def form(self, contestant: Contestant, rows: int, columns: int) -> tuple[Form, str]:
        cubics = cubic_steps(contestant.coefficients)
        steps = len(contestant.coefficients)
        return Iteration(steps, self.algorithm, cubics=cubics).form(rows, columns)


ENGINES = {
    "Triton": Engine(True, "auto"),
    "Triton, standard": Engine(True, "standard"),
    "XLA, standard": Engine(False, "standard"),
}
"""The kernels as an optimizer takes them, and both engines in bfloat16. Each runs a race of its own."""


def races(shapes: Sequence[Stack], pace: Pace) -> Iterator[Race]:
    """One for every shape and engine; on square matrices "auto" is the standard form, and raced once.

    Operations are useful ones: half of a symmetric product's.
    """
    for shape in shapes:
        found = problems(*shape[1:])
        raced = set()
        for name, engine in ENGINES.items():
            forms = tuple(engine.form(each, *shape[1:]) for each in CONTESTANTS.values())
            if (engine.by_kernels, forms) in raced:
                continue
            raced.add((engine.by_kernels, forms))
            what = "x".join(map(str, shape)) + f", {name}"
            rows = [
                Row(what, who, base=BASE, operations=_work(shape, engine, contestant))
                for who, contestant in CONTESTANTS.items()
            ]
            base: dict[str, float] = {}
            prepare = {
                who: functools.partial(_prepared, shape, engine, contestant, found, base)
                for who, contestant in CONTESTANTS.items()
            }
            yield race(what, rows, prepare, pace)


def _work(shape: Stack, engine: Engine, contestant: Contestant) -> float:
    count, *sides = shape
    short, long = sorted(sides)
    form, _ = engine.form(contestant, short, long)
    return count * operations(
        *(short, long, len(contestant.coefficients)),
        form=form,
        symmetric=True,
        cubics=cubic_steps(contestant.coefficients),
    )


def _prepared(
    shape: Stack,
    engine: Engine,
    contestant: Contestant,
    found: Mapping[str, Problem],
    base: dict[str, float],
) -> Prepared:
    """`base` holds the errors of the first contestant of the race, which fills it."""
    form, dtype = engine.form(contestant, *shape[1:])
    prepared, orthogonalize = (
        _by_kernels(shape, form, dtype, contestant)
        if engine.by_kernels
        else _by_xla(shape, dtype, contestant)
    )
    of_matrices = errors(orthogonalize, found)
    if not base:
        base.update(of_matrices)
    return prepared._replace(more={"error": over(of_matrices, base), **of_matrices})


def _by_kernels(
    shape: Stack, form: Form, dtype: str, contestant: Contestant
) -> tuple[Prepared, Callable[[torch.Tensor], torch.Tensor]]:
    if not torch.cuda.is_available():
        raise RuntimeError("the kernels need a CUDA device, and PyTorch sees none")
    orthogonalize = functools.partial(
        contestant.polar_factor,
        torch_ref.polar_factor,
        backend="triton",
        algorithm=form,
        compute_dtype=getattr(torch, dtype),
    )
    x = torch.randn(shape, device="cuda").to(getattr(torch, dtype))
    run = functools.partial(orthogonalize, x)
    # In a graph, so that no launch is timed; kernels compile before it is captured.
    run()
    return Prepared(Captured(run), torch.cuda.synchronize), orthogonalize


def _by_xla(
    shape: Stack, dtype: str, contestant: Contestant
) -> tuple[Prepared, Callable[[torch.Tensor], torch.Tensor]]:
    function = functools.partial(
        contestant.polar_factor,
        optax_normuon.polar_factor,
        backend="xla",
        algorithm="standard",
        compute_dtype=jnp.dtype(dtype),
    )
    return by_jax(function, shape, dtype), in_jax(contestant)
