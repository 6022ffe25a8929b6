"""The direction of an update: momentum, polar factor and neuron normalization, stages 1 to 3."""

from collections.abc import Callable

import jax
import optax
from jax.typing import DTypeLike

from normuon_core.cost import Algorithm
from normuon_core.polynomials import Coefficients
from normuon_core.recipes import Recipe, find_recipe
from optax_normuon.kernels.backend import Backend
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.leaves.layout import LayoutTree, Views
from optax_normuon.leaves.precision import in_working_precision
from optax_normuon.matrices.on_matrices import on_matrices
from optax_normuon.mesh.specs import Specs, SpecTree
from optax_normuon.plans import Execution
from optax_normuon.stages.momentum import momentum_stage
from optax_normuon.stages.orthogonalization import Orthogonalizer


@refuse_injection_of_static_arguments
def scale_by_normuon(
    *,
    recipe: str | Recipe = "normuon",
    momentum: optax.ScalarOrSchedule | None = None,
    nesterov: bool | None = None,
    beta2: float | jax.Array | None = None,
    coefficients: str | Coefficients | None = None,
    steps: int | None = None,
    eps: float | None = None,
    layout: LayoutTree = None,
    orthogonalizer: Orthogonalizer | None = None,
    momentum_dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    algorithm: Algorithm = "auto",
    backend: Backend = "auto",
    param_specs: SpecTree = None,
    max_stack_bytes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, polar factor and neuron normalization alone, without decay, scale or learning rate.

    For chains of one's own. Leaves that are no matrices get the momentum only: mask them away, or
    give them to another transformation with `optax.partition`. Arguments and errors as `normuon`'s;
    updates keep the gradient's dtype, or the parameter's where parameters are passed.
    """
    chosen = find_recipe(recipe).override(
        momentum=momentum,
        nesterov=nesterov,
        beta2=beta2,
        coefficients=coefficients,
        steps=steps,
        eps=eps,
    )
    execution = Execution(
        chosen,
        orthogonalizer=orthogonalizer,
        momentum_dtype=momentum_dtype,
        compute_dtype=compute_dtype,
        algorithm=algorithm,
        backend=backend,
        max_stack_bytes=max_stack_bytes,
    )
    direction = direction_of(execution)
    return in_working_precision(direction(layout, param_specs))


def direction_of(
    execution: Execution,
) -> Callable[[LayoutTree | Views, SpecTree | Specs], optax.GradientTransformation]:
    """Stages 1 to 3, as a function of a layout and of how the leaves lie on a mesh."""
    stages = execution.stages()

    def direction(
        layout: LayoutTree | Views, specs: SpecTree | Specs
    ) -> optax.GradientTransformation:
        momentum = momentum_stage(
            execution.recipe.momentum,
            momentum_dtype=execution.momentum_dtype,
            layout=layout,
            param_specs=specs,
        )
        return optax.chain(
            momentum,
            on_matrices(
                stages,
                layout=layout,
                max_stack_bytes=execution.max_stack_bytes,
                param_specs=specs,
            ),
        )

    return direction
