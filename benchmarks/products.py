"""Single products of the iteration: the kernel against cuBLAS, on float16 matrices."""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from benchmarks.captured import Captured
from benchmarks.race import Pace, Prepared, Race, race
from benchmarks.rows import Row
from normuon_core.kernels.products import KernelProducts
from torch_ref.kernels import launcher

OURS = "kernel"
CUBLAS = "cuBLAS, no addend"


class Problem(NamedTuple):
    """A product as the iteration makes it, of `count` matrices short x long.

    Attributes:
      kind: "gram", x x^T; "multiply", of two symmetric matrices, with `addends` and a diagonal if there
        are two; "apply", s x + x, the one product of which both triangles are computed.
    """

    kind: str
    count: int
    short: int
    long: int
    addends: int = 0

    @property
    def name(self) -> str:
        size = f"{self.count}x{self.short}x{self.long}"
        match self.kind, self.addends:
            case "apply", _:
                kind = "full, 1 addend"
            case "gram", _:
                kind = "Gram"
            case _, 2:
                kind = "symmetric, 2 addends and diagonal"
            case _:
                kind = "symmetric, 1 addend"
        return f"{size}, {kind}"

    @property
    def operations(self) -> float:
        """Of the whole product, as cuBLAS makes it: a symmetric one has half as many that are useful."""
        return 2 * self.count * self.short**2 * self.long

    @property
    def useful(self) -> float:
        return self.operations / (1 if self.kind == "apply" else 2)


PROBLEMS = [
    Problem("apply", 16, 2048, 2048),
    Problem("apply", 16, 2048, 8192),
    Problem("multiply", 16, 2048, 2048, addends=1),
    Problem("multiply", 16, 2048, 2048, addends=2),
    Problem("gram", 16, 2048, 2048),
    Problem("gram", 16, 2048, 8192),
    Problem("apply", 48, 768, 768),
    Problem("multiply", 48, 768, 768, addends=1),
    Problem("apply", 24, 768, 3072),
    Problem("gram", 24, 768, 3072),
    Problem("apply", 32, 512, 2048),
    Problem("multiply", 32, 512, 512, addends=1),
    Problem("gram", 32, 512, 2048),
]
QUICK_PROBLEMS = [
    Problem("apply", 2, 32, 64),
    Problem("multiply", 2, 32, 32, addends=2),
    Problem("gram", 2, 32, 64),
]


class Operands:
    """Random matrices of a problem; a symmetric product is that of a matrix with itself."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        count, short, long = problem[1:4]
        self.x = self._draw(count, short, long)
        s = self._draw(count, short, short)
        self.s = s + s.mT

    def _draw(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).half()

    def ours(self) -> torch.Tensor:
        """By the kernel that the iteration takes for this size on this device."""
        count, short, long = self.problem[1:4]
        device = launcher.describe_device(self.device)
        products = KernelProducts(launcher.launch, device, count, short, long, "float16")
        match self.problem.kind:
            case "apply":
                return products.apply(self.s, self.x, alpha=1.0, addend=1.0)
            case "gram":
                return products.gram(self.x, alpha=1.0)
        addends = [(self.s, 1.0)] * self.problem.addends
        diagonal = 1.0 if self.problem.addends == 2 else 0.0
        return products.multiply(self.s, self.s, alpha=1.0, addends=addends, diagonal=diagonal)

    def cublas(self) -> torch.Tensor:
        match self.problem.kind:
            case "apply":
                return torch.bmm(self.s, self.x)
            case "gram":
                return torch.bmm(self.x, self.x.mT)
        return torch.bmm(self.s, self.s)

    def prepare(self, who: str) -> Prepared:
        """Captured in a CUDA graph: a small product takes less time than its launch from Python."""
        run = {OURS: self.ours, CUBLAS: self.cublas}[who]
        if self.device.type != "cuda":
            return Prepared(run, lambda: None)
        run()
        return Prepared(Captured(run), torch.cuda.synchronize)


def races(problems: Sequence[Problem], pace: Pace) -> Iterator[Race]:
    """One for every problem. The reference is the time of its useful operations at the rate at which
    cuBLAS makes the whole product without addends in the same race.
    """
    for problem in problems:
        rows = [
            Row(problem.name, who, base=CUBLAS, operations=problem.useful) for who in (CUBLAS, OURS)
        ]
        operands = Operands(problem)
        prepare = {row.who: functools.partial(operands.prepare, row.who) for row in rows}
        result = race(problem.name, rows, prepare, pace)
        cublas = rows[0].milliseconds
        if cublas is not None and operands.device.type == "cuda":
            for row in rows:
                row.reference = cublas * problem.useful / problem.operations
        yield result
