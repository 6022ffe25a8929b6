"""The two forms of the iteration by the kernels, on matrices of which "auto" must choose one."""

import functools
from collections.abc import Iterator, Sequence

import torch

import torch_ref
from benchmarks.captured import Captured
from benchmarks.race import Pace, Prepared, Race, race
from benchmarks.rows import Row
from benchmarks.workloads import Stack
from normuon_core.cost import Form, Iteration, operations

STEPS = 5

DTYPES: dict[Form, torch.dtype] = {"standard": torch.bfloat16, "gram": torch.float16}


def races(shapes: Sequence[Stack], pace: Pace) -> Iterator[Race]:
    """One for every shape. Each form has its own operations; the row of the one that "auto" takes says
    so by "chosen 1"."""
    for shape in shapes:
        what = "x".join(map(str, shape))
        prepare = {form: functools.partial(_prepared, shape, form) for form in DTYPES}
        rows = [Row(what, form, base="standard", operations=_work(shape, form)) for form in DTYPES]
        result = race(what, rows, prepare, pace)
        chosen, _ = Iteration(STEPS).form(*shape[1:])
        for row in rows:
            row.more = {"chosen": float(row.who == chosen)}
        yield result


def _work(shape: Stack, form: Form) -> float:
    count, *sides = shape
    short, long = sorted(sides)
    return count * operations(short, long, STEPS, form=form, symmetric=True)


def _prepared(shape: Stack, form: Form) -> Prepared:
    if not torch.cuda.is_available():
        raise RuntimeError("the kernels need a CUDA device, and PyTorch sees none")
    x = torch.randn(shape, device="cuda").to(DTYPES[form])

    def run():
        return torch_ref.polar_factor(x, backend="triton", algorithm=form)

    # In a graph, so that no launch is timed; kernels compile before it is captured.
    run()
    return Prepared(Captured(run), torch.cuda.synchronize)
