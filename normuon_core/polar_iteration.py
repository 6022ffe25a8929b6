"""Stage 2's iteration, as a sequence of matrix products that a framework supplies.

One definition for JAX and PyTorch, for library products and for kernels: what is multiplied by what,
in which order and at which scale, is the same everywhere.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar

from normuon_core.polynomials import Coefficients

Array = TypeVar("Array")

BEFORE_SQUARING = 2.0**9
"""What u is multiplied by before its norm is taken: exact, and divided out again with the norm.

float32 squares underflow below 1e-19 and their sum overflows above a norm of 1.8e19. Gradients of norm
1e-15 to 1e15 make u of norm 5e-17 (the first step of lerp momentum) to 2e16 (20 g: heavy ball), and the
entries of a matrix are a thousand times smaller than its norm, or more. This power of two brings that
range into float32's."""

FEW_ROWS = 512
"""Below this short side the Gram form restarts after two steps at the most, above after three.

A rounding error in a Gram matrix R grows by h(R)^2 with every step that R is carried on, a^2 in the
directions that need lifting most. Entries of the first R are near 1/short, so its errors allow three
steps where the short side is long; later ones have entries near 1, and two steps keep their errors
below those of the bfloat16 standard form. `parity_tests/test_half_precision.py` has the figures."""


class Products(Protocol[Array]):
    """What an iteration needs: products that accumulate and finish in float32 or wider and round once.

    X is a stack of matrices; S and T are square, symmetric, of the shorter side's size, and commute.
    """

    def gram(self, x: Array, *, alpha: float) -> Array:
        """alpha X X^T; alpha X^T X of a tall X."""
        ...

    def multiply(
        self,
        s: Array,
        t: Array,
        *,
        alpha: float,
        addends: Sequence[tuple[Array, float]] = (),
        diagonal: float = 0.0,
    ) -> Array:
        """alpha S T, plus each addend times its factor, plus diagonal I: known to be symmetric."""
        ...

    def apply(self, s: Array, x: Array, *, alpha: float, addend: float = 0.0) -> Array:
        """alpha S X + addend X; on a tall X alpha X S + addend X."""
        ...


def gram_restarts(steps: int, short: int) -> tuple[int, ...]:
    """The steps, counted from 0, before which the Gram form starts again from X.

    The last stretch has two steps, those before it three, or two with fewer than `FEW_ROWS` rows. Of
    five steps on a large matrix: before the fourth. Restarts: Dao-AILab/gram-newton-schulz, before the
    third.
    """
    stretch = 2 if short < FEW_ROWS else 3
    return tuple(range(steps - 2, 0, -stretch))[::-1]


def range_scales(rows: int, columns: int, compute_dtype: str) -> tuple[float, float]:
    """Powers of two by which X and its Gram matrix are stored: 1 but in float16.

    A normalised matrix has entries near 1/sqrt(rows columns) and a Gram matrix near 1/short on its
    diagonal; on large shapes that is close to float16's smallest normal number. Scaled they lie near
    1, and the caps keep a matrix with a single large entry below float16's largest, 65504. Powers of
    two change no bit of a significand; the products' epilogues undo them.
    """
    if compute_dtype != "float16":
        return 1.0, 1.0
    x_exponent = min(math.floor(math.log2(rows * columns) / 2), 13)
    gram_exponent = min(math.floor(math.log2(min(rows, columns))), 12)
    return 2.0**x_exponent, 2.0**gram_exponent


Precondition = Callable[[Array, Array, float], tuple[Array, Array]]
"""(X, its Gram matrix times a scale, that scale) to both of a preconditioned X."""


def iterate(
    x: Array,
    coefficients: Coefficients,
    products: Products[Array],
    *,
    algorithm: Literal["standard", "gram"],
    short: int,
    scales: tuple[float, float],
    precondition: Precondition[Array] | None = None,
) -> Array:
    """The composed polynomial of X, by either form.

    A cubic, c = 0, needs no square of the Gram matrix: b A takes the place of b A + c A^2, and b acts in
    the epilogues of the products with it.

    Args:
      x: (count, rows, columns) in the compute dtype, normalised, times the first of `scales`.
      short: the matrices' shorter side. scales: from `range_scales`; the result is unscaled.
      precondition: what is done to X and its Gram matrix before the first step.
    """
    if algorithm == "gram":
        return _gram_form(x, coefficients, products, short, *scales, precondition)
    return _standard_form(x, coefficients, products, *scales, precondition)


def _standard_form(
    x: Array,
    coefficients: Coefficients,
    products: Products[Array],
    x_scale: float,
    gram_scale: float,
    precondition: Precondition[Array] | None,
) -> Array:
    """Each step A = X X^T, X <- a X + (b A + c A^2) X."""
    for step, (a, b, c) in enumerate(coefficients):
        gram = products.gram(x, alpha=gram_scale / x_scale**2)
        if step == 0 and precondition is not None:
            x, gram = precondition(x, gram, gram_scale)
        z, factor = _z(products, gram, b, c, 1 / gram_scale)
        freed = 1 / x_scale if step == len(coefficients) - 1 else 1.0
        x = products.apply(z, x, alpha=factor * freed / gram_scale, addend=a * freed)
    return x


def _z(
    products: Products[Array], gram: Array, b: float, c: float, free: float
) -> tuple[Array, float]:
    """(Z, f) with f Z = b A + c A^2, all times A's scale, of which `free` is the inverse."""
    if c == 0:
        return gram, b
    return products.multiply(gram, gram, alpha=c * free, addends=[(gram, b)]), 1.0


def _gram_form(
    x: Array,
    coefficients: Coefficients,
    products: Products[Array],
    short: int,
    x_scale: float,
    gram_scale: float,
    precondition: Precondition[Array] | None,
) -> Array:
    """The same polynomial through R = X X^T alone.

    With p(x) = x h(x^2): Z = b R + c R^2, so that h(R) = a I + Z; Q <- Q h(R), R <- h(R) R h(R), and
    X <- Q X at the end and at every restart, where R is rebuilt. a I + Z is never rounded: beside a, the
    small entries of Z would be lost. So after one step Q is Z, with a kept apart, and with the factor f
    of `_z`.
    """
    restarts = gram_restarts(len(coefficients), short)
    free = 1 / gram_scale

    def leave(q: Array, apart: float, f: float, *, scale: float = 1.0) -> Array:
        """scale Q X, where Q = a I + f Z is still `apart`, or in one piece (0)."""
        alpha = f * scale * free if apart else scale
        return products.apply(q, x, alpha=alpha, addend=apart * scale)

    q, r, apart, f = None, None, 0.0, 1.0
    for step, (a, b, c) in enumerate(coefficients):
        if q is not None and step in restarts:
            x, q = leave(q, apart, f), None
        if q is None or r is None:
            r = products.gram(x, alpha=gram_scale / x_scale**2)
        if step == 0 and precondition is not None:
            x, r = precondition(x, r, gram_scale)
        z, factor = _z(products, r, b, c, free)
        if q is None:
            q, apart, f = z, a, factor
        elif apart:
            q = products.multiply(
                q,
                z,
                alpha=f * factor * free**2,
                addends=[(q, f * a * free), (z, apart * factor * free)],
                diagonal=apart * a,
            )
            apart = 0.0
        else:
            q = products.multiply(q, z, alpha=factor * free, addends=[(q, a)])
        if step + 1 < len(coefficients) and step + 1 not in restarts:
            half_way = products.multiply(r, z, alpha=factor * free, addends=[(r, a)])
            r = products.multiply(z, half_way, alpha=factor * free, addends=[(half_way, a)])
    assert q is not None
    return leave(q, apart, f, scale=1 / x_scale)
