"""What the iteration costs, and which form and dtype that makes it take."""

from dataclasses import dataclass
from typing import Literal, get_args

from normuon_core.polar_iteration import gram_restarts

Algorithm = Literal["standard", "gram", "auto"]
Form = Literal["standard", "gram"]


GRAM_RATE = 0.94
"""The kernels' operations a second in the Gram form over those in the standard one, near ratio 1: more
of its products are the small symmetric ones. On an H100 it is 0.86 at a short side of 768, 0.91 at 2048
and 0.94 at 4096, and of eleven shapes "auto" takes the slower form of one, 768 x 960, by 7 %
(`python -m benchmarks --only forms`)."""


def operations(
    short: float, long: float, steps: int, *, form: Form, symmetric: bool, cubics: int = 0
) -> float:
    """Floating-point operations of `steps` steps on one matrix, of which `cubics` have no A^2.

    With ratio = long / short, in short^3 and for five steps on a large matrix: the standard form takes
    20 ratio + 10, the Gram form 8 ratio + 28; with products that know their result to be symmetric
    15 ratio + 5 and 6 ratio + 14.
    """
    ratio = long / short
    square = 1 if symmetric else 2
    squares = steps - cubics
    if form == "standard":
        return (steps * (square + 2) * ratio + squares * square) * short**3
    stretches = len(gram_restarts(steps, int(short))) + 1
    carried = steps - stretches
    return (stretches * (square + 2) * ratio + square * (squares + 3 * carried)) * short**3


def gram_saves(short: int, long: int, steps: int, *, symmetric: bool, cubics: int = 0) -> bool:
    """Whether the Gram form takes less time than the standard one, the kernels' at `GRAM_RATE`."""
    standard, gram = (
        operations(short, long, steps, form=form, symmetric=symmetric, cubics=cubics)
        for form in ("standard", "gram")
    )
    return gram / (GRAM_RATE if symmetric else 1) < standard


def check_algorithm(algorithm: str) -> None:
    """Raises a ValueError unless `algorithm` is one."""
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"unknown algorithm {algorithm!r}; use one of {get_args(Algorithm)}.")


@dataclass(frozen=True)
class Iteration:
    """The iteration that is asked for, as far as its cost depends on it.

    Attributes:
      steps: of the polynomial.
      algorithm, compute_dtype: as the caller gives them, "auto" and None included.
      on_gpu: where it runs.
      symmetric: whether products that are known to be symmetric cost half, as the kernels' do.
      cubics: how many of the steps are cubics.
    """

    steps: int
    algorithm: Algorithm = "auto"
    compute_dtype: str | None = None
    on_gpu: bool = True
    symmetric: bool = True
    cubics: int = 0

    def __post_init__(self):
        check_algorithm(self.algorithm)

    def form(self, rows: int, columns: int) -> tuple[Form, str]:
        """(form, compute dtype): what "auto" and None stand for on a matrix of these sides.

        "auto" is the Gram form on GPUs where it takes fewer operations, unless the compute dtype is
        bfloat16, in which it loses the small singular directions. (float16 products are slow on CPUs
        and missing on TPUs.) None is float16 where the Gram form runs and bfloat16 elsewhere.
        """
        algorithm = self.algorithm
        if algorithm == "auto":
            short, long = sorted((rows, columns))
            saves = gram_saves(
                short, long, self.steps, symmetric=self.symmetric, cubics=self.cubics
            )
            chosen = self.on_gpu and saves and self.compute_dtype != "bfloat16"
            algorithm = "gram" if chosen else "standard"
        return algorithm, self.compute_dtype or ("float16" if algorithm == "gram" else "bfloat16")

    @property
    def dtype_on_shards(self) -> str | None:
        """The compute dtype of the Gram form on a divided matrix; None where it must not run there.

        It is not bfloat16, and float16 only where that is fast.
        """
        if self.algorithm == "standard" or self.compute_dtype == "bfloat16":
            return None
        return self.compute_dtype or ("float16" if self.on_gpu else "float32")
