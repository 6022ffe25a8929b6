"""Stage 2: the polar factor, by an odd polynomial in the matrix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from normuon_core.cost import Algorithm, Form, Iteration, check_algorithm
from normuon_core.kernels_support import kernels_support
from normuon_core.placement import Placement, Spread, place
from normuon_core.polar_iteration import BEFORE_SQUARING, iterate, range_scales
from normuon_core.polynomials import (
    POLAR_EXPRESS,
    Coefficients,
    cubic_steps,
    find_coefficients,
    with_steps,
)
from normuon_core.recipes import EpsRule, Polar, Preconditioning
from optax_normuon.kernels.backend import Backend, check_backend, takes_kernels
from optax_normuon.leaves.arrays import Matrices, Statistics
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree
from optax_normuon.leaves.precision import working_dtype
from optax_normuon.matrices.on_matrices import on_matrices
from optax_normuon.matrices.stack import MatrixStack, MatrixStage, Prepared
from optax_normuon.mesh.specs import SpecTree

Orthogonalizer = Callable[[Matrices], Matrices]
"""(batch, rows, columns) to the same, in any floating dtype."""


def polar_factor(
    x: ArrayLike,
    *,
    coefficients: str | Coefficients = POLAR_EXPRESS,
    steps: int | None = None,
    norm_scale: float = 1.02,
    eps: float = 1e-17,
    eps_rule: EpsRule = "max",
    preconditioning: Preconditioning = "frobenius",
    compute_dtype: DTypeLike | None = None,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
) -> jax.Array:
    """Each matrix with its singular values driven towards 1: U p(S) V^T, an approximate U V^T.

    X = x / max(norm_scale |x|_F, eps), then per triple (a, b, c) of `coefficients`
    X <- (a I + b A + c A^2) X with A = X X^T; on tall matrices mirrored, X <- X (a I + b A + c A^2) with
    A = X^T X, so that A has the shorter side's size and nothing is transposed.

    Args:
      x: (..., rows, columns), real floating point. Zero matrices stay zero; a NaN or Inf, or a norm
        that overflows, makes its own matrix NaN and no other.
      coefficients: a name of `normuon_core.POLYNOMIALS`, or one (a, b, c) a step, as
        `normuon_core.polar_express` makes them.
      steps: how many of them, see `normuon_core.polynomials.with_steps`; None is all.
      norm_scale: at least 1; keeps rounding in the norm from lifting a singular value above 1.
      eps: the floor of the scaled norm (`eps_rule="max"`), or added to it (`"add"`). Norms from 1e-15 to
        1e16 give the same factor; below the floor it fades to zero.
      preconditioning: "frobenius" goes on from there; "aol" divides each row of the shorter side by the
        root of its sum in |X X^T| first, and the set "aol" is made for it (Turbo-Muon, arXiv
        2512.04632). The kernels do not have it.
      compute_dtype: dtype of the iterates; products accumulate and finish in float32 (float64 for
        float64). None is bfloat16, and float16 where the Gram form runs.
      algorithm: "gram" iterates on the Gram matrix alone (Dao-AILab/gram-newton-schulz), equal in
        exact arithmetic and cheaper where one side is long; float16 keeps its accuracy, bfloat16
        does not. "auto" is "gram" on GPUs where it takes fewer operations, unless the compute dtype
        is bfloat16, else "standard".
      backend: "triton" for the kernels that PyTorch runs too, "xla" for XLA's own products, or
        "auto": "triton" on a CUDA device with Triton, for the dtypes it takes (no float64),
        where there is one device or within `jax.shard_map`.

    Returns:
      An array like `x`, rounded to the compute dtype and back.

    Raises:
      ValueError: fewer than two axes, unknown coefficients or more steps than they have, an unknown
        `algorithm` or `backend`, or "triton" where it cannot run.
      TypeError: `x` or `compute_dtype` is not floating point.
    """
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"polar_factor needs a matrix or a stack of them, got shape {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"polar_factor needs real floating point, got {x.dtype}")
    stage = orthogonalization_stage(
        coefficients=_chosen(coefficients, steps),
        norm_scale=norm_scale,
        eps=eps,
        eps_rule=eps_rule,
        preconditioning=preconditioning,
        compute_dtype=compute_dtype,
        algorithm=algorithm,
        backend=backend,
    )
    stack = MatrixStack(x.reshape(-1, *x.shape[-2:]), output_axis=-1)
    result, _ = stage.update(stack, stage.init(stack))
    return result.values.reshape(x.shape).astype(x.dtype)


@refuse_injection_of_static_arguments
def orthogonalize(
    *,
    coefficients: str | Coefficients = POLAR_EXPRESS,
    steps: int | None = None,
    norm_scale: float = 1.02,
    eps: float = 1e-17,
    eps_rule: EpsRule = "max",
    preconditioning: Preconditioning = "frobenius",
    compute_dtype: DTypeLike | None = None,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
    layout: LayoutTree = None,
    max_stack_bytes: int | None = None,
    param_specs: SpecTree = None,
) -> optax.GradientTransformation:
    """Replaces every matrix of the updates by its `polar_factor`; other leaves pass unchanged.

    Muon is `optax.chain(lerp_momentum(), orthogonalize(), optax.scale_by_learning_rate(lr))`.

    Args:
      layout, max_stack_bytes, param_specs: see `normuon`. The others: see `polar_factor`.

    Raises:
      ValueError: see `polar_factor` and `normuon`.
    """
    stage = orthogonalization_stage(
        coefficients=_chosen(coefficients, steps),
        norm_scale=norm_scale,
        eps=eps,
        eps_rule=eps_rule,
        preconditioning=preconditioning,
        compute_dtype=compute_dtype,
        algorithm=algorithm,
        backend=backend,
    )
    return on_matrices(
        stage, layout=layout, max_stack_bytes=max_stack_bytes, param_specs=param_specs
    )


def _chosen(coefficients: str | Coefficients, steps: int | None) -> Coefficients:
    """The coefficients of so many steps."""
    found = find_coefficients(coefficients)
    return found if steps is None else with_steps(found, steps)


def orthogonalization_stage(
    *,
    coefficients: Coefficients,
    norm_scale: float,
    eps: float,
    eps_rule: EpsRule,
    preconditioning: Preconditioning,
    compute_dtype: DTypeLike | None,
    algorithm: Algorithm,
    backend: Backend,
) -> MatrixStage[optax.EmptyState]:
    """Stage 2 on a `MatrixStack`: values of any floating dtype in, compute dtype out."""
    polar = Polar(coefficients, norm_scale, eps, eps_rule, preconditioning)
    check_algorithm(algorithm)
    check_backend(backend)
    supported = kernels_support(polar)
    if backend == "triton" and not supported:
        raise ValueError(f"backend='triton': {supported}; use backend='auto'.")
    if compute_dtype is not None and not jnp.issubdtype(compute_dtype, jnp.floating):
        raise TypeError(f"compute_dtype={compute_dtype} is not real floating point.")
    name = None if compute_dtype is None else jnp.dtype(compute_dtype).name

    def init(stack: MatrixStack) -> optax.EmptyState:
        del stack
        return optax.EmptyState()

    def by_kernels(dtype: DTypeLike, *, on_mesh: bool = False) -> bool:
        dtypes = [dtype, *([name] if name else [])]
        return bool(supported) and takes_kernels(backend, dtypes, specs_known=on_mesh)

    def place_group(spread: Spread, may_stay: bool) -> Placement:
        iteration = Iteration(
            len(coefficients),
            algorithm,
            name,
            on_gpu=jax.default_backend() == "gpu",
            symmetric=by_kernels(spread.dtype, on_mesh=spread.on_mesh),
            cubics=cubic_steps(coefficients),
        )
        return place(spread, iteration, may_stay=may_stay)

    def form_of(stack: MatrixStack) -> tuple[Form, str]:
        placement = stack.placement
        if placement is None or placement.form is None:
            spread = Spread(len(stack.values), *stack.sides, dtype=stack.values.dtype.name)
            placement = place_group(spread, False)
        assert placement.form is not None
        assert placement.dtype is not None
        return placement.form, placement.dtype

    def prepare(stack: MatrixStack) -> MatrixStack:
        stays = stack.shards is not None and stack.shards.stay
        kernels = not stays and by_kernels(stack.values.dtype)
        form, chosen = form_of(stack)
        u = stack.values.astype(working_dtype(stack.values.dtype))
        u = u * BEFORE_SQUARING
        squares = stack.sum_over(jnp.square(u), (-2, -1))
        rows, columns = stack.sides
        scale, _ = range_scales(rows, columns, chosen)
        x = (_normalize(u, squares, norm_scale, eps, eps_rule) * scale).astype(chosen)
        return stack.with_values(x, prepared=Prepared(form, kernels))

    def update(stack: MatrixStack, state: optax.EmptyState) -> tuple[MatrixStack, optax.EmptyState]:
        if stack.prepared is None and by_kernels(stack.values.dtype):
            from optax_normuon.kernels.polar import polar_factors

            form, dtype = form_of(stack)
            v = polar_factors(stack.values, polar, form=form, dtype=dtype)
            return stack.with_values(v), state
        prepared = stack if stack.prepared else prepare(stack)
        assert prepared.prepared is not None
        x, shards = prepared.values, prepared.shards
        rows, columns = prepared.sides
        scales = range_scales(rows, columns, x.dtype.name)
        if prepared.prepared.by_kernels:
            from optax_normuon.kernels.polar import iterate_stack

            v = iterate_stack(x, coefficients, prepared.prepared.form, x.dtype.name)
            return prepared.with_values(v), state
        products = XlaProducts(rows <= columns)
        if shards is not None:
            x = shards.along_the_long_side(x)
            products = XlaProducts(rows <= columns, (*shards.row_axes, *shards.column_axes))
        v = iterate(
            x,
            coefficients,
            products,
            algorithm=prepared.prepared.form,
            short=min(rows, columns),
            scales=scales,
            precondition=partial(aol, wide=rows <= columns) if preconditioning == "aol" else None,
        )
        if shards is not None:
            v = shards.back(v, prepared.values.shape)
        return prepared.with_values(v), state

    return MatrixStage(init, update, prepare, place_group, takes_shards=True)


def aol(x: Matrices, gram: jax.Array, scale: float, *, wide: bool) -> tuple[Matrices, jax.Array]:
    """AOL preconditioning of X and its Gram matrix A: diag(s) X and diag(s) A diag(s).

    s_i = 1 / sqrt(sum_j |A_ij|), and 1 for a row of zeros. By Gershgorin's theorem no eigenvalue of
    diag(s) A diag(s), which is similar to diag(s^2) A, is above 1.

    Args:
      x: (batch, rows, columns), or parts of it that have the shorter side whole.
      gram: of the shorter side, times `scale`. wide: whether that is the rows.
    """
    dtype = working_dtype(x.dtype)
    lifted = gram.astype(dtype)
    sums = jnp.sum(jnp.abs(lifted), axis=-1, keepdims=True) / scale
    s = jax.lax.rsqrt(jnp.where(sums > 0, sums, jnp.ones_like(sums)))
    scaled = x.astype(dtype) * (s if wide else s.mT)
    return scaled.astype(x.dtype), (lifted * s * s.mT).astype(gram.dtype)


def stage_of_orthogonalizer(orthogonalizer: Orthogonalizer) -> MatrixStage[optax.EmptyState]:
    """A function of the user's own in the place of stage 2."""

    def update(stack: MatrixStack, state: optax.EmptyState) -> tuple[MatrixStack, optax.EmptyState]:
        result = orthogonalizer(stack.values)
        if result.shape != stack.values.shape:
            raise ValueError(
                f"orthogonalizer returned shape {result.shape} for a stack of shape"
                f" {stack.values.shape}; it must keep (batch, rows, columns)."
            )
        return stack.with_values(result), state

    return MatrixStage(lambda stack: optax.EmptyState(), update)


def _normalize(
    u: Matrices, squares: Statistics, norm_scale: float, eps: float, eps_rule: EpsRule
) -> Matrices:
    """u over its norm, from `BEFORE_SQUARING` u and the sum of its squares; eps is for u itself."""
    eps = eps * BEFORE_SQUARING
    norm = norm_scale * jnp.sqrt(squares)
    # A finite matrix over an overflowed norm would be a silent zero.
    norm = jnp.where(jnp.isinf(norm), jnp.nan, norm)
    return u / (jnp.maximum(norm, eps) if eps_rule == "max" else norm + eps)


@dataclass(frozen=True)
class XlaProducts:
    """`normuon_core.polar_iteration.Products` by XLA.

    Attributes:
      wide: whether X has no more rows than columns; else it is tall.
      axes: mesh axes over which X is divided along its longer side.
    """

    wide: bool
    axes: tuple[str, ...] = ()

    def gram(self, x: jax.Array, *, alpha: float) -> jax.Array:
        return _product(
            x,
            x,
            alpha=alpha,
            transpose_a=not self.wide,
            transpose_b=self.wide,
            sum_over=self.axes,
        )

    def multiply(
        self,
        s: jax.Array,
        t: jax.Array,
        *,
        alpha: float,
        addends: Sequence[tuple[jax.Array, float]] = (),
        diagonal: float = 0.0,
    ) -> jax.Array:
        return _product(s, t, alpha=alpha, addends=addends, diagonal=diagonal)

    def apply(self, s: jax.Array, x: jax.Array, *, alpha: float, addend: float = 0.0) -> jax.Array:
        left, right = (s, x) if self.wide else (x, s)
        return _product(left, right, alpha=alpha, addends=[(x, addend)] if addend else [])


def _product(
    a: jax.Array,
    b: jax.Array,
    *,
    alpha: float,
    addends: Sequence[tuple[jax.Array, float]] = (),
    diagonal: float = 0.0,
    transpose_a: bool = False,
    transpose_b: bool = False,
    sum_over: tuple[str, ...] = (),
) -> jax.Array:
    """alpha op(a) op(b), summed over mesh axes, plus each addend times its factor, plus diagonal I.

    Accumulated, summed and finished in float32 (float64 for float64), and rounded once to a's dtype.
    """
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
    product = product * alpha
    if sum_over:
        product = jax.lax.psum(product, sum_over)
    for addend, factor in addends:
        product = product + addend.astype(accumulator) * factor
    if diagonal:
        product = product + jnp.eye(product.shape[-1], dtype=accumulator)[None] * diagonal
    return product.astype(a.dtype)
