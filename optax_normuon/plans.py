"""Which engine steps which matrices: what `normuon` runs and `describe` prints."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from normuon_core.cost import Algorithm, Iteration
from normuon_core.recipes import Recipe
from optax_normuon.kernels.backend import Backend, takes_kernels
from optax_normuon.leaves.layout import Views
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.matrices.on_matrices import StagesOnXla
from optax_normuon.matrices.plan import Stack, plan, stack_ceiling
from optax_normuon.matrices.stack import MatrixStage, chain_stages
from optax_normuon.mesh.placed_leaf import place_leaf
from optax_normuon.mesh.specs import Specs
from optax_normuon.stages.neuron_norm import neuron_norm_stage
from optax_normuon.stages.orthogonalization import (
    Orthogonalizer,
    orthogonalization_stage,
    stage_of_orthogonalizer,
)


@dataclass(frozen=True)
class Execution:
    """How stages 2 and 3 are run, as `normuon`'s keywords of these names say."""

    recipe: Recipe
    orthogonalizer: Orthogonalizer | None = None
    momentum_dtype: Any = None
    compute_dtype: Any = None
    algorithm: Algorithm = "auto"
    backend: Backend = "auto"
    max_stack_bytes: int | None = None

    def __post_init__(self):
        if self.backend == "triton" and self.orthogonalizer is not None:
            raise ValueError(
                "backend='triton' has its own orthogonalization; leave the orthogonalizer out, or use"
                " backend='auto'."
            )

    def stages(self) -> MatrixStage:
        """Stages 2 and 3, for XLA."""
        if self.orthogonalizer is not None:
            first = stage_of_orthogonalizer(self.orthogonalizer)
        else:
            first = orthogonalization_stage(
                **vars(self.recipe.polar),
                compute_dtype=self.compute_dtype,
                algorithm=self.algorithm,
                backend=self.backend,
            )
        if self.recipe.neuron_norm is None:
            return chain_stages(first)
        return chain_stages(first, neuron_norm_stage(**vars(self.recipe.neuron_norm)))

    def takes_kernels(self, dtypes: Iterable[Any], *, placed: bool) -> bool:
        """Whether the kernels step the matrices.

        Args:
          dtypes: of their parameters and gradients. placed: whether it is known how these are spread.
        """
        if self.orthogonalizer is not None:
            return False
        own = [dtype for dtype in (self.momentum_dtype, self.compute_dtype) if dtype is not None]
        return takes_kernels(self.backend, [*own, *dtypes], placed=placed)

    def kernels(self):
        """The kernels as an engine. Triton is needed from here on."""
        from optax_normuon.kernels.engine import Kernels

        name = None if self.compute_dtype is None else jnp.dtype(self.compute_dtype).name
        iteration = Iteration(len(self.recipe.polar.coefficients), self.algorithm, name)
        return Kernels(self.recipe, iteration, stack_ceiling(self.max_stack_bytes))


def plans(
    execution: Execution, leaves: Mapping[KeyPath, Any], views: Views, specs: Specs | None
) -> dict[str, list[Stack[KeyPath]]]:
    """By the engine's name the stacks that it steps.

    Args:
      leaves: the parameters that hold matrices.
    """
    placed = {path: place_leaf(views[path], path, specs) for path in leaves}
    dtypes = {path: leaf.dtype for path, leaf in leaves.items()}
    ceiling = stack_ceiling(execution.max_stack_bytes)
    result = {}
    if execution.takes_kernels(dtypes.values(), placed=specs is not None):
        from optax_normuon.kernels.engine import left_to_xla

        kernels = execution.kernels()
        left = left_to_xla(placed, dtypes, kernels, specs)
        stepped = {path: leaf for path, leaf in placed.items() if path not in left}
        result[kernels.name] = plan(stepped, dtypes, kernels, specs, ceiling=ceiling)
        placed = {path: leaf for path, leaf in placed.items() if path in left}
    xla = StagesOnXla(execution.stages())
    result[xla.name] = plan(placed, dtypes, xla, specs, ceiling=ceiling)
    return result
