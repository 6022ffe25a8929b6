"""Which engine steps which matrices: what `normuon` runs and `describe` prints."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from normuon_core.cost import Algorithm, Iteration
from normuon_core.kernels_support import KernelsSupport, kernels_support
from normuon_core.polynomials import cubic_steps
from normuon_core.recipes import Recipe
from optax_normuon.kernels.backend import Backend, takes_kernels
from optax_normuon.leaves.layout import Views
from optax_normuon.leaves.paths import KeyPath
from optax_normuon.matrices.plan import PlannedStack, plan, stack_ceiling
from optax_normuon.matrices.stack import MatrixStage, chain_stages
from optax_normuon.matrices.stages_on_xla import StagesOnXla
from optax_normuon.mesh.leaf_on_mesh import leaf_on_mesh
from optax_normuon.mesh.specs import Specs
from optax_normuon.stages.momentum import check_momentum_dtype
from optax_normuon.stages.neuron_norm import neuron_norm_stage
from optax_normuon.stages.norm_setting import norm_setting_stage
from optax_normuon.stages.orthogonalization import (
    Orthogonalizer,
    orthogonalization_stage,
    stage_of_orthogonalizer,
)
from optax_normuon.stages.row_equilibration import equilibrated

if TYPE_CHECKING:
    from optax_normuon.kernels.engine import Kernels


@dataclass(frozen=True)
class Execution:
    """How the stages of matrices are run, as `normuon`'s keywords of these names say.

    Raises:
      ValueError: a `momentum_dtype` that cannot hold momentum, or `backend="triton"` beside an
        `orthogonalizer` or for what no kernel can run.
    """

    recipe: Recipe
    orthogonalizer: Orthogonalizer | None = None
    momentum_dtype: DTypeLike | None = None
    compute_dtype: DTypeLike | None = None
    algorithm: Algorithm = "auto"
    backend: Backend = "auto"
    max_stack_bytes: int | None = None

    def __post_init__(self):
        check_momentum_dtype(self.momentum_dtype)
        if self.backend != "triton":
            return
        if self.orthogonalizer is not None:
            raise ValueError(
                "backend='triton' has its own orthogonalization; leave the orthogonalizer out, or use"
                " backend='auto'."
            )
        if not self.support:
            raise ValueError(
                f"backend='triton': {self.support}; use backend='auto', which leaves that to XLA."
            )

    @property
    def support(self) -> KernelsSupport:
        """Whether the kernels can run the recipe, with its momentum in that dtype."""
        dtype = self.momentum_dtype
        name = None if dtype is None else jnp.dtype(dtype).name
        return kernels_support(self.recipe, momentum_dtype=name)

    def stages(self) -> MatrixStage:
        """Stages 2 and 3, and what the recipe has before and between them, for XLA."""
        recipe = self.recipe
        if self.orthogonalizer is not None:
            first = stage_of_orthogonalizer(self.orthogonalizer)
        else:
            first = orthogonalization_stage(
                **vars(recipe.polar),
                compute_dtype=self.compute_dtype,
                algorithm=self.algorithm,
                backend=self.backend,
            )
        if recipe.row_equilibration is not None:
            first = equilibrated(first, **vars(recipe.row_equilibration))
        others: list[MatrixStage] = []
        if recipe.norm_setting is not None:
            others.append(norm_setting_stage(**vars(recipe.norm_setting)))
        if recipe.neuron_norm is not None:
            others.append(neuron_norm_stage(**vars(recipe.neuron_norm)))
        return chain_stages(first, *others)

    def takes_kernels(self, dtypes: Iterable[DTypeLike], *, specs_known: bool) -> bool:
        """Whether the kernels step the matrices.

        Args:
          dtypes: of their parameters and gradients.
          specs_known: whether it is known how these are divided over devices.
        """
        if self.orthogonalizer is not None or not self.support:
            return False
        own = [dtype for dtype in (self.momentum_dtype, self.compute_dtype) if dtype is not None]
        return takes_kernels(self.backend, [*own, *dtypes], specs_known=specs_known)

    def kernels(self) -> "Kernels":
        """The kernels as an engine. Triton is needed from here on."""
        from optax_normuon.kernels.engine import Kernels

        name = None if self.compute_dtype is None else jnp.dtype(self.compute_dtype).name
        coefficients = self.recipe.polar.coefficients
        iteration = Iteration(
            len(coefficients), self.algorithm, name, cubics=cubic_steps(coefficients)
        )
        return Kernels(self.recipe, iteration, stack_ceiling(self.max_stack_bytes))


def plans(
    execution: Execution, leaves: Mapping[KeyPath, jax.Array], views: Views, specs: Specs | None
) -> dict[str, list[PlannedStack[KeyPath]]]:
    """The stacks that each engine steps, by the engine's name.

    Args:
      leaves: the parameters that hold matrices: arrays or abstract arrays.
    """
    on_mesh = {path: leaf_on_mesh(views[path], path, specs) for path in leaves}
    dtypes = {path: np.dtype(leaf.dtype) for path, leaf in leaves.items()}
    ceiling = stack_ceiling(execution.max_stack_bytes)
    result = {}
    if execution.takes_kernels(dtypes.values(), specs_known=specs is not None):
        from optax_normuon.kernels.engine import left_to_xla

        kernels = execution.kernels()
        left = left_to_xla(on_mesh, dtypes, kernels, specs)
        stepped = {path: leaf for path, leaf in on_mesh.items() if path not in left}
        result[kernels.name] = plan(stepped, dtypes, kernels, specs, ceiling=ceiling)
        on_mesh = {path: leaf for path, leaf in on_mesh.items() if path in left}
    xla = StagesOnXla(execution.stages())
    result[xla.name] = plan(on_mesh, dtypes, xla, specs, ceiling=ceiling)
    return result
