"""NorMuon and the Muon family of optimizers as Optax transformations."""

from normuon_core import (
    POLYNOMIALS,
    RECIPES,
    HeadLayout,
    MatrixLayout,
    Recipe,
    __version__,
    polar_express,
)
from optax_normuon.alias import muon
from optax_normuon.description import describe
from optax_normuon.diagnostics import (
    MatrixDiagnostics,
    orthogonality_error,
    orthogonality_errors,
    update_diagnostics,
)
from optax_normuon.direction import scale_by_normuon
from optax_normuon.leaves.injection import STATIC_ARGS, inject_hyperparams
from optax_normuon.leaves.layout_by_path import layout_by_path
from optax_normuon.leaves.multipliers import multipliers_by_path
from optax_normuon.matrices.on_matrices import on_matrices
from optax_normuon.matrices.stack import MatrixStack, MatrixStage, chain_stages
from optax_normuon.mesh.state_specs import state_specs
from optax_normuon.older_states import older_state
from optax_normuon.optimizer import normuon
from optax_normuon.qk_clip import qk_clip
from optax_normuon.remainder import with_bf16_remainder
from optax_normuon.run_arrays import (
    parameter_shapes,
    parameters_from_arrays,
    parameters_to_arrays,
    state_from_arrays,
    state_to_arrays,
)
from optax_normuon.sphere import project_to_sphere, project_to_tangent, to_sphere
from optax_normuon.stages.hyperball import to_hyperball
from optax_normuon.stages.momentum import (
    bias_corrected_momentum,
    heavy_ball_momentum,
    lerp_momentum,
)
from optax_normuon.stages.neuron_norm import normalize_neurons
from optax_normuon.stages.norm_setting import set_norm
from optax_normuon.stages.orthogonalization import orthogonalize, polar_factor
from optax_normuon.stages.row_equilibration import equilibrate_rows
from optax_normuon.stages.shape_scaling import scale_by_shape
from optax_normuon.stages.weight_decay import add_cautious_weight_decay
from optax_normuon.stepping import apply

__all__ = [
    "POLYNOMIALS",
    "RECIPES",
    "STATIC_ARGS",
    "HeadLayout",
    "MatrixDiagnostics",
    "MatrixLayout",
    "MatrixStack",
    "MatrixStage",
    "Recipe",
    "__version__",
    "add_cautious_weight_decay",
    "apply",
    "bias_corrected_momentum",
    "chain_stages",
    "describe",
    "equilibrate_rows",
    "heavy_ball_momentum",
    "inject_hyperparams",
    "layout_by_path",
    "lerp_momentum",
    "multipliers_by_path",
    "muon",
    "normalize_neurons",
    "normuon",
    "older_state",
    "on_matrices",
    "orthogonality_error",
    "orthogonality_errors",
    "orthogonalize",
    "parameter_shapes",
    "parameters_from_arrays",
    "parameters_to_arrays",
    "polar_express",
    "polar_factor",
    "project_to_sphere",
    "project_to_tangent",
    "qk_clip",
    "scale_by_normuon",
    "scale_by_shape",
    "set_norm",
    "state_from_arrays",
    "state_specs",
    "state_to_arrays",
    "to_hyperball",
    "to_sphere",
    "update_diagnostics",
    "with_bf16_remainder",
]
