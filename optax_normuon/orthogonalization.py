"""Stage 2: the polar factor, by an odd polynomial in the matrix."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from normuon_core.polynomials import (
    MAX_GRAM_AMPLIFICATION,
    POLAR_EXPRESS,
    Coefficients,
    gram_restarts_before,
    last_amplification,
)
from normuon_core.recipes import EpsRule
from optax_normuon.layout import LayoutTree
from optax_normuon.precision import working_dtype
from optax_normuon.stacking import MatrixStack, MatrixStage, on_matrices

Algorithm = Literal["standard", "gram", "auto"]
Backend = Literal["xla", "auto"]


def polar_factor(
    x: ArrayLike,
    *,
    coefficients: Coefficients = POLAR_EXPRESS,
    norm_scale: float = 1.02,
    eps: float = 1e-6,
    eps_rule: EpsRule = "add",
    compute_dtype: DTypeLike | None = None,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
) -> jax.Array:
    """Each matrix with its singular values driven towards 1: U p(S) V^T, an approximate U V^T.

    X = x / (norm_scale |x|_F + eps), then per triple (a, b, c) of `coefficients`
    X <- (a I + b A + c A^2) X with A = X X^T; on tall matrices mirrored, X <- X (a I + b A + c A^2) with
    A = X^T X, so that A has the shorter side's size and nothing is transposed.

    Args:
      x: (..., rows, columns), real floating point. Zero matrices stay zero; a NaN or Inf, or a norm
        that overflows, makes its own matrix NaN and no other.
      coefficients: a set of `normuon_core.POLYNOMIALS`, or from `normuon_core.polar_express`.
      norm_scale: at least 1; keeps rounding in the norm from lifting a singular value above 1.
      eps: added to the scaled norm (`eps_rule="add"`), or its floor (`"max"`).
      compute_dtype: dtype of the iterates; products accumulate and finish in float32 (float64 for
        float64). None is bfloat16, and float16 where the Gram form runs.
      algorithm: "gram" iterates on the Gram matrix alone (Dao-AILab/gram-newton-schulz), equal in
        exact arithmetic and cheaper where one side is long; float16 keeps its accuracy, bfloat16
        does not. "auto" is "gram" on GPUs for sides in a ratio above 1.5, unless the compute dtype is
        bfloat16 or the polynomials amplify too much (`normuon_core.polynomials`), else "standard".
      backend: "xla", or "auto" for the best that is there.

    Returns:
      An array like `x`, rounded to the compute dtype and back.

    Raises:
      ValueError: fewer than two axes, no coefficients, an unknown `algorithm` or `backend`.
      TypeError: `x` or `compute_dtype` is not floating point.
    """
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"polar_factor needs a matrix or a stack of them, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"polar_factor needs real floating point, got {x.dtype}")
    stage = orthogonalization_stage(
        coefficients=coefficients,
        norm_scale=norm_scale,
        eps=eps,
        eps_rule=eps_rule,
        compute_dtype=compute_dtype,
        algorithm=algorithm,
        backend=backend,
    )
    stack = MatrixStack(x.reshape(-1, *x.shape[-2:]), output_axis=-1)
    result, _ = stage.update(stack, stage.init(stack))
    return result.values.reshape(x.shape).astype(x.dtype)


def orthogonalize(
    *,
    coefficients: Coefficients = POLAR_EXPRESS,
    norm_scale: float = 1.02,
    eps: float = 1e-6,
    eps_rule: EpsRule = "add",
    compute_dtype: DTypeLike | None = None,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
    layout: LayoutTree = None,
    max_stack_bytes: int | None = None,
) -> optax.GradientTransformation:
    """Replaces every matrix of the updates by its `polar_factor`; other leaves pass unchanged.

    Muon is `optax.chain(lerp_momentum(), orthogonalize(), optax.scale_by_learning_rate(lr))`.

    Args:
      layout, max_stack_bytes: see `normuon`. The others: see `polar_factor`.

    Raises:
      ValueError: see `polar_factor` and `normuon`.
    """
    stage = orthogonalization_stage(
        coefficients=coefficients,
        norm_scale=norm_scale,
        eps=eps,
        eps_rule=eps_rule,
        compute_dtype=compute_dtype,
        algorithm=algorithm,
        backend=backend,
    )
    return on_matrices(stage, layout=layout, max_stack_bytes=max_stack_bytes)


def orthogonalization_stage(
    *,
    coefficients: Coefficients,
    norm_scale: float,
    eps: float,
    eps_rule: EpsRule,
    compute_dtype: DTypeLike | None,
    algorithm: Algorithm,
    backend: Backend,
) -> MatrixStage:
    """Stage 2 on a `MatrixStack`: values of any floating dtype in, compute dtype out."""
    if not coefficients:
        raise ValueError("coefficients is empty; give one (a, b, c) a step, as in POLYNOMIALS.")
    if algorithm not in get_args(Algorithm):
        raise ValueError(f"algorithm={algorithm!r} is unknown; use one of {get_args(Algorithm)}.")
    if backend not in get_args(Backend):
        raise ValueError(
            f"backend={backend!r} is not available here; use one of {get_args(Backend)}."
        )
    if compute_dtype is not None and not jnp.issubdtype(compute_dtype, jnp.floating):
        raise TypeError(f"compute_dtype={compute_dtype} is not real floating point.")

    def init(stack):
        del stack
        return optax.EmptyState()

    def update(stack, state):
        u = stack.values.astype(working_dtype(stack.values.dtype))
        x = _normalize(u, norm_scale, eps, eps_rule)
        gram = _takes_gram(algorithm, x.shape, coefficients, compute_dtype)
        dtype = compute_dtype or (jnp.float16 if gram else jnp.bfloat16)
        iterate = _gram_form if gram else _standard_form
        return MatrixStack(iterate(x, coefficients, jnp.dtype(dtype)), stack.output_axis), state

    return MatrixStage(init, update)


def _normalize(u, norm_scale: float, eps: float, eps_rule: EpsRule):
    norm = norm_scale * jnp.sqrt(jnp.sum(jnp.square(u), axis=(-2, -1), keepdims=True))
    # A finite matrix over an overflowed norm would be a silent zero.
    norm = jnp.where(jnp.isinf(norm), jnp.nan, norm)
    return u / (jnp.maximum(norm, eps) if eps_rule == "max" else norm + eps)


def _takes_gram(algorithm: Algorithm, shape, coefficients: Coefficients, compute_dtype) -> bool:
    if algorithm != "auto":
        return algorithm == "gram"
    bf16 = compute_dtype is not None and jnp.dtype(compute_dtype) == jnp.bfloat16
    # float16 products are slow on CPUs and missing on TPUs.
    on_gpu = jax.default_backend() == "gpu"
    return (
        on_gpu
        and not bf16
        and last_amplification(coefficients) <= MAX_GRAM_AMPLIFICATION
        and _gram_saves(shape, len(coefficients))
    )


def _gram_saves(shape, steps: int) -> bool:
    """Whether the Gram form takes fewer operations, in units of the short side cubed.

    Five steps, long side over short = ratio: 8 ratio + 28 against 20 ratio + 10, so above 1.5.
    """
    short, long = sorted(shape[-2:])
    restarts = sum(map(gram_restarts_before, range(steps)))
    carried = steps - 1 - restarts
    gram = 4 * (1 + restarts) * long + (2 * steps + 6 * carried) * short
    return gram < steps * (4 * long + 2 * short)


def _product(
    a, b, *, scale=1.0, addend=None, addend_scale=1.0, transpose_a=False, transpose_b=False
):
    """scale * op(a) op(b) + addend_scale * addend: accumulated and finished in float32 (float64 for
    float64), rounded once to a's dtype."""
    accumulator = working_dtype(a.dtype)
    contracting = (1 if transpose_a else 2,), (2 if transpose_b else 1,)
    product = jax.lax.dot_general(
        a,
        b,
        (contracting, ((0,), (0,))),
        # float32 on a GPU would otherwise mean tf32.
        precision=jax.lax.Precision.HIGHEST if a.dtype == accumulator else None,
        preferred_element_type=accumulator,
    )
    product = product * scale
    if addend is not None:
        product = product + addend.astype(accumulator) * addend_scale
    return product.astype(a.dtype)


def _gram_matrix(x, scale: float = 1.0):
    """X X^T, or X^T X where X is tall, times `scale`."""
    wide = x.shape[-2] <= x.shape[-1]
    return _product(x, x, scale=scale, transpose_a=not wide, transpose_b=wide)


def _apply(b, x, *, scale: float = 1.0, a: float | None = None):
    """scale * B X (X B where X is tall), plus a X."""
    left, right = (b, x) if x.shape[-2] <= x.shape[-1] else (x, b)
    addend = None if a is None else x
    return _product(left, right, scale=scale, addend=addend, addend_scale=1.0 if a is None else a)


def _range_scales(shape, dtype) -> tuple[float, float]:
    """Powers of two by which X and its Gram matrix are stored: 1 but in float16.

    A normalised matrix has entries near 1/sqrt(rows columns) and a Gram matrix near 1/short on its
    diagonal; on large shapes that is close to float16's smallest normal number. Scaled they lie near
    1, and the caps keep a matrix with a single large entry below float16's largest, 65504. Powers of
    two change no bit of a significand; the products' epilogues undo them.
    """
    if dtype != jnp.float16:
        return 1.0, 1.0
    rows, columns = shape[-2:]
    x_exponent = min(math.floor(math.log2(rows * columns) / 2), 13)
    gram_exponent = min(math.floor(math.log2(min(rows, columns))), 12)
    return 2.0**x_exponent, 2.0**gram_exponent


def _standard_form(x, coefficients: Coefficients, dtype):
    x_scale, gram_scale = _range_scales(x.shape, dtype)
    x = (x * x_scale).astype(dtype)
    for step, (a, b, c) in enumerate(coefficients):
        gram = _gram_matrix(x, gram_scale / x_scale**2)
        z = _product(gram, gram, scale=c / gram_scale, addend=gram, addend_scale=b)
        freed = 1 / x_scale if step == len(coefficients) - 1 else 1.0
        x = _apply(z, x, scale=freed / gram_scale, a=a * freed)
    return x


def _gram_form(x, coefficients: Coefficients, dtype):
    """The same polynomial through R = X X^T alone.

    Z = bR + cR^2, Q <- Q(aI + Z), R <- (aI + Z)R(aI + Z), and X <- QX at the end and at every restart,
    where R is rebuilt. aI + Z is stored only as Q's first value: beside a, Z's small entries would
    round away.
    """
    x_scale, gram_scale = _range_scales(x.shape, dtype)
    x = (x * x_scale).astype(dtype)
    q = gram = None
    for step, (a, b, c) in enumerate(coefficients):
        if gram_restarts_before(step):
            x, q = _apply(q, x), None
        if q is None:
            gram = _gram_matrix(x, gram_scale / x_scale**2)
        z = _product(gram, gram, scale=c / gram_scale, addend=gram, addend_scale=b)
        if q is None:
            q = _plus_identity(z, a, 1 / gram_scale)
        else:
            q = _product(q, z, scale=1 / gram_scale, addend=q, addend_scale=a)
        if step + 1 < len(coefficients) and not gram_restarts_before(step + 1):
            half = _product(gram, z, scale=1 / gram_scale, addend=gram, addend_scale=a)
            gram = _product(z, half, scale=1 / gram_scale, addend=half, addend_scale=a)
    return _apply(q, x, scale=1 / x_scale)


def _plus_identity(z, a: float, scale: float):
    accumulator = working_dtype(z.dtype)
    identity = jnp.eye(z.shape[-1], dtype=accumulator)[None]
    return (z.astype(accumulator) * scale + identity * a).astype(z.dtype)
