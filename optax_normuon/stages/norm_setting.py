"""After stage 2: every matrix gets the norm that an exact polar factor has."""

import jax.numpy as jnp
import optax

from normuon_core.recipes import NormSetting
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree
from optax_normuon.leaves.precision import working_dtype
from optax_normuon.matrices.on_matrices import on_matrices
from optax_normuon.matrices.stack import MatrixStack, MatrixStage, where_it_lies
from optax_normuon.mesh.specs import SpecTree


@refuse_injection_of_static_arguments
def set_norm(
    *,
    eps: float = 1e-6,
    layout: LayoutTree = None,
    max_stack_bytes: int | None = None,
    param_specs: SpecTree = None,
) -> optax.GradientTransformation:
    """Gives every matrix the Frobenius norm that an exact polar factor of its shape has.

    To be used after `orthogonalize`, whose polynomial leaves singular values somewhat above and below 1,
    and tiny ones far below. v <- v sqrt(min(r, c)) / max(|v|_F, eps). Source: Muon+, arXiv 2602.21545;
    nanochat.

    Args:
      eps: a floor of the norm, below which a matrix is not lifted. A zero matrix stays zero.
      layout, max_stack_bytes, param_specs: see `normuon`.

    Raises:
      ValueError: a negative `eps`, or see `normuon`.
    """
    stage = norm_setting_stage(eps)
    return on_matrices(
        stage, layout=layout, max_stack_bytes=max_stack_bytes, param_specs=param_specs
    )


def norm_setting_stage(eps: float) -> MatrixStage[optax.EmptyState]:
    """The stage on a `MatrixStack`; arithmetic in float32 (float64 for float64), rounded once to the
    dtype of the values."""
    NormSetting(eps)

    def update(stack: MatrixStack, state: optax.EmptyState) -> tuple[MatrixStack, optax.EmptyState]:
        v = stack.values.astype(working_dtype(stack.values.dtype))
        norm = jnp.sqrt(stack.sum_over(jnp.square(v), (-2, -1)))
        factor = min(stack.sides) ** 0.5 / jnp.maximum(norm, eps)
        return stack.with_values((v * factor).astype(stack.values.dtype)), state

    return MatrixStage(
        lambda stack: optax.EmptyState(), update, place=where_it_lies, takes_shards=True
    )
