"""`python -m benchmarks.tune`: the product kernels and their tiles, measured on this GPU.

Rewrites this architecture's table in `normuon_core/kernels/tiles.json`, from which every run takes its
configurations: fixed ones, because a search at run time would change bits from run to run.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.timing import median_milliseconds
from normuon_core.kernels.tiles import HopperConfiguration, ProductConfiguration

Configuration = ProductConfiguration | HopperConfiguration
Kind = TypeVar("Kind", ProductConfiguration, Configuration)

TABLE = Path(str(resources.files("normuon_core.kernels").joinpath("tiles.json")))

LARGEST_ERROR = 1e-3
"""Relative Frobenius error against cuBLAS in float16; 3e-4 is one rounding."""


class Problem(NamedTuple):
    """A product of `count` matrices (m, k) and (k, n)."""

    symmetric: bool
    m: int
    n: int
    k: int
    count: int

    @property
    def addends(self) -> int:
        """As in the iteration: a Gram matrix has none."""
        return 0 if self.symmetric and self.k != self.m else 1


SYMMETRIC = [
    *((n, n, n, count) for n, count in ((128, 64), (256, 64), (512, 32), (768, 48), (1024, 24))),
    *((n, n, n, count) for n, count in ((2048, 16), (4096, 4), (8192, 1))),
    *((n, n, 4 * n, count) for n, count in ((512, 32), (768, 24), (1024, 24), (2048, 16))),
    (4096, 4096, 14336, 4),
]
GENERAL = [
    *((n, n, n, count) for n, count in ((128, 64), (256, 64), (768, 48), (2048, 16), (4096, 4))),
    *((n, 4 * n, n, count) for n, count in ((512, 32), (768, 24), (1024, 24), (2048, 16))),
    (4096, 14336, 4096, 4),
    (8192, 8192, 8192, 1),
]
PROBLEMS = [
    *(Problem(True, *sizes) for sizes in SYMMETRIC),
    *(Problem(False, *sizes) for sizes in GENERAL),
]

BOTH = [
    (128, 128, 64, 4, 3, 2),
    (128, 128, 64, 8, 3, 1),
    (128, 128, 64, 8, 4, 1),
    (128, 256, 64, 8, 3, 1),
    (128, 256, 64, 8, 4, 1),
    (64, 128, 64, 4, 3, 3),
    (64, 64, 64, 4, 4, 3),
]
CANDIDATES = {
    True: [*BOTH, (128, 128, 128, 8, 3, 1), (64, 64, 64, 4, 3, 4)],
    False: [*BOTH, (64, 256, 64, 4, 3, 1), (128, 256, 128, 8, 2, 1)],
}


HOPPER = [(256, 4, 2), (256, 3, 4), (128, 6, 2), (128, 5, 4), (128, 4, 4)]


def candidates(problem: Problem, *, hopper: bool) -> list[Configuration]:
    """Those whose tile is at most twice the matrix's side. `hopper`: for its own kernel too."""
    found: list[Configuration] = [
        ProductConfiguration(*each)
        for each in CANDIDATES[problem.symmetric]
        if each[0] <= 2 * problem.m and each[1] <= 2 * problem.n
    ]
    if hopper:
        own = (HopperConfiguration(*each) for each in HOPPER)
        found += [each for each in own if each.tile_n <= 2 * problem.n]
    return found


class Operands(NamedTuple):
    """Tensors of one problem, and what the product of a and b should be, by cuBLAS."""

    a: torch.Tensor
    b: torch.Tensor
    d: torch.Tensor
    wanted: torch.Tensor


def operands(problem: Problem) -> Operands:
    """Random ones; symmetric products of a matrix with itself."""
    _, m, n, k, count = problem

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").half()

    a = draw(count, m, k)
    b = a if problem.symmetric else draw(count, k, n)
    d = draw(count, m, n)
    if problem.symmetric:
        d = d + d.mT
    product = torch.bmm(a, b.mT if problem.symmetric else b, torch.float32)
    return Operands(a, b, d, product + d.float() if problem.addends else product)


def launch_of(problem: Problem, configuration: Configuration):
    """The product kernel with this configuration, on this machine's GPU."""
    from normuon_core.kernels import launches
    from torch_ref.kernels import launcher

    return launches.product(
        problem.count,
        problem.m,
        problem.n,
        problem.k,
        dtype="float16",
        configuration=configuration,
        multiprocessors=launcher.describe_device(torch.device("cuda", 0)).multiprocessors,
        b_transposed=problem.symmetric,
        symmetric=problem.symmetric,
        addends=problem.addends,
        has_diagonal=False,
    )


def multiplication(
    problem: Problem, configuration: Configuration, given: Operands
) -> Callable[[], torch.Tensor]:
    """A function that multiplies the operands once with this configuration."""
    from torch_ref.kernels import launcher

    launch = launch_of(problem, configuration)
    inputs = [given.a, given.b, given.d, given.d, 1.0, 1.0, 0.0, 0.0, problem.count]
    return lambda: launcher.launch(launch, inputs)[0]


def compile_ahead(job: tuple[Problem, Configuration]) -> None:
    """Fills Triton's cache on disk; a configuration that does not compile fails again when timed."""
    problem, configuration = job
    launch = launch_of(problem, configuration)
    array = torch.empty(8, dtype=torch.float16, device="cuda")
    scalars = (1.0, 1.0, 0.0, 0.0, problem.count)
    try:
        launch.kernel.warmup(
            *[array] * 4,
            *scalars,
            *launch.sizes,
            array,
            grid=(1,),
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=False,
            **launch.constants,
        )
    except Exception as error:
        print(f"{problem} {configuration}: {type(error).__name__}")


def in_a_graph(function: Callable[[], object]) -> Callable[[], None]:
    """Ten calls as one CUDA graph: of a small product the launch would take longer than the work."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            function()
    return graph.replay


def choose(times: Mapping[Kind, float], errors: Mapping[Kind, float]) -> Kind:
    """The fastest of those that compute the right thing.

    Raises:
      ValueError: none does.
    """
    right = [each for each in times if errors[each] <= LARGEST_ERROR]
    if not right:
        raise ValueError(f"no configuration is right: {errors}")
    return min(right, key=times.__getitem__)


def entry(
    problem: Problem,
    times: Mapping[Configuration, float],
    errors: Mapping[Configuration, float],
) -> dict[str, list[int]]:
    """A line of the table: the best of Triton's tiles, and Hopper's own kernel where it is faster."""
    best = choose(times, errors)
    portable = {
        each: time for each, time in times.items() if isinstance(each, ProductConfiguration)
    }
    found = {
        "size": [problem.m, problem.n, problem.k],
        "configuration": list(choose(portable, errors)),
    }
    return found | ({"hopper": list(best)} if isinstance(best, HopperConfiguration) else {})


def with_table(tables: dict, architecture: str, chosen: dict[Problem, dict]) -> dict:
    """The tables with this architecture's put in; the others are kept."""
    own: dict[str, list] = {"general": [], "symmetric": []}
    for problem, line in chosen.items():
        own["symmetric" if problem.symmetric else "general"].append(line)
    return {**tables, architecture: own}


def write(tables: dict, path: Path) -> None:
    """One entry a line."""
    lines = []
    for architecture, table in tables.items():
        kinds = []
        for kind, entries in table.items():
            rows = ",\n".join(f"   {json.dumps(entry)}" for entry in entries)
            kinds.append(f'  "{kind}": [\n{rows}\n  ]')
        lines.append(f' "{architecture}": {{\n' + ",\n".join(kinds) + "\n }")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(
    out: Annotated[Path, typer.Option(help="The table to rewrite.")] = TABLE,
) -> None:
    """Time every candidate on every size, and keep the fastest in the table."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("tuning needs a CUDA GPU, and PyTorch sees none")
    from torch_ref.kernels import launcher

    console = Console()
    hopper = launcher.describe_device(torch.device("cuda", 0)).takes_hopper_kernels
    jobs = [(problem, each) for problem in PROBLEMS for each in candidates(problem, hopper=hopper)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=spawn) as pool:
        list(track(pool.map(compile_ahead, jobs), "compiling", total=len(jobs), console=console))
    chosen = {}
    for problem in PROBLEMS:
        given = operands(problem)
        times: dict[Configuration, float] = {}
        errors: dict[Configuration, float] = {}
        for configuration in candidates(problem, hopper=hopper):
            multiply = multiplication(problem, configuration, given)
            try:
                result = multiply().float()
            except Exception as error:
                console.print(f"{problem} {configuration}: {type(error).__name__}")
                continue
            distance = (result - given.wanted).norm() / given.wanted.norm()
            errors[configuration] = float(distance)
            times[configuration] = median_milliseconds(in_a_graph(multiply)) / 10
        chosen[problem] = entry(problem, times, errors)
        best = choose(times, errors)
        useful = problem.count * problem.m * problem.n * problem.k * (2 - problem.symmetric)
        rate = useful / times[best] / 1e9
        console.print(f"{problem}: {tuple(best)}, {times[best]:.3f} ms, {rate:.0f} TFLOP/s")
    major, minor = torch.cuda.get_device_capability()
    tables = json.loads(out.read_text()) if out.exists() else {}
    write(with_table(tables, f"sm{major}{minor}", chosen), out)
    console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
