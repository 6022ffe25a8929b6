"""Before stage 2: every output neuron's row of u gets the same norm."""

import jax.numpy as jnp
import optax

from normuon_core.polar_iteration import BEFORE_SQUARING
from normuon_core.recipes import RowEquilibration
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree
from optax_normuon.leaves.precision import working_dtype
from optax_normuon.matrices.on_matrices import on_matrices
from optax_normuon.matrices.stack import MatrixStack, MatrixStage, State, where_it_lies
from optax_normuon.mesh.specs import SpecTree


@refuse_injection_of_static_arguments
def equilibrate_rows(
    *,
    eps: float = 1e-6,
    layout: LayoutTree = None,
    max_stack_bytes: int | None = None,
    param_specs: SpecTree = None,
) -> optax.GradientTransformation:
    """Gives all output neurons of a matrix rows of one norm; keeps the matrix's norm.

    To be used before `orthogonalize`, which then starts from singular values that lie closer together
    where some neurons' gradients are much larger than others'. With r output neurons, row i of u is
    multiplied by (|u|_F / sqrt(r)) / max(|u_i|, eps). Source: MuonEq, arXiv 2603.28254; nanochat.

    Args:
      eps: a floor of a row's norm, absolute: rows below it are not lifted to the others' norm.
      layout, max_stack_bytes, param_specs: see `normuon`.

    Raises:
      ValueError: a negative `eps`, or see `normuon`.
    """
    stage = row_equilibration_stage(eps)
    return on_matrices(
        stage, layout=layout, max_stack_bytes=max_stack_bytes, param_specs=param_specs
    )


def row_equilibration_stage(eps: float) -> MatrixStage[optax.EmptyState]:
    """The stage on a `MatrixStack`; it returns float32 (float64 for float64)."""
    RowEquilibration(eps)

    def update(stack: MatrixStack, state: optax.EmptyState) -> tuple[MatrixStack, optax.EmptyState]:
        outputs, inputs = stack.output_axis, -3 - stack.output_axis
        u = stack.values.astype(working_dtype(stack.values.dtype))
        squares = stack.sum_over(jnp.square(u * BEFORE_SQUARING), (inputs,))
        mean = stack.sum_over(squares, (outputs,)) / stack.sides[outputs]
        factors = jnp.sqrt(mean) / jnp.maximum(jnp.sqrt(squares), eps * BEFORE_SQUARING)
        return stack.with_values(u * factors), state

    return MatrixStage(
        lambda stack: optax.EmptyState(), update, place=where_it_lies, takes_shards=True
    )


def equilibrated(stage: MatrixStage[State], eps: float) -> MatrixStage[State]:
    """`stage` on matrices whose rows are equilibrated, as one stage.

    On a mesh the rows are equilibrated where they lie, and what `stage` prepares of them is sent.
    """
    rows = row_equilibration_stage(eps)

    def first(stack: MatrixStack) -> MatrixStack:
        return rows.update(stack, optax.EmptyState())[0]

    def prepare(stack: MatrixStack) -> MatrixStack:
        prepared = stage.prepare(first(stack))
        # What has not been prepared, `update` equilibrates.
        return prepared if prepared.prepared else stack

    def update(stack: MatrixStack, state: State) -> tuple[MatrixStack, State]:
        return stage.update(stack if stack.prepared else first(stack), state)

    return stage._replace(prepare=prepare, update=update)
