"""NorMuon and the Muon family in PyTorch, the twin of `optax_normuon`: one function a stage."""

from normuon_core import HeadLayout, MatrixLayout, __version__
from torch_ref.description import describe
from torch_ref.diagnostics import (
    MatrixDiagnostics,
    matrix_weights,
    orthogonality_error,
    orthogonality_errors,
    update_diagnostics,
)
from torch_ref.optimizer import NorMuon
from torch_ref.parameter_groups import param_groups
from torch_ref.qk_clip import qk_clip
from torch_ref.run_arrays import (
    parameters_from_arrays,
    parameters_to_arrays,
    state_from_arrays,
    state_to_arrays,
)
from torch_ref.sphere import project_to_sphere, project_to_tangent, to_sphere
from torch_ref.stages.adamw import adamw
from torch_ref.stages.hyperball import to_hyperball
from torch_ref.stages.momentum import bias_corrected_momentum, heavy_ball_momentum, lerp_momentum
from torch_ref.stages.neuron_norm import normalize_neurons
from torch_ref.stages.norm_setting import set_norm
from torch_ref.stages.orthogonalization import polar_factor
from torch_ref.stages.product import product
from torch_ref.stages.remainder import join_remainder, split_remainder
from torch_ref.stages.row_equilibration import equilibrate_rows
from torch_ref.stages.shape_scaling import scale_by_shape
from torch_ref.stages.weight_decay import add_cautious_weight_decay

__all__ = [
    "HeadLayout",
    "MatrixDiagnostics",
    "MatrixLayout",
    "NorMuon",
    "__version__",
    "adamw",
    "add_cautious_weight_decay",
    "bias_corrected_momentum",
    "describe",
    "equilibrate_rows",
    "heavy_ball_momentum",
    "join_remainder",
    "lerp_momentum",
    "matrix_weights",
    "normalize_neurons",
    "orthogonality_error",
    "orthogonality_errors",
    "param_groups",
    "parameters_from_arrays",
    "parameters_to_arrays",
    "polar_factor",
    "product",
    "project_to_sphere",
    "project_to_tangent",
    "qk_clip",
    "scale_by_shape",
    "set_norm",
    "split_remainder",
    "state_from_arrays",
    "state_to_arrays",
    "to_hyperball",
    "to_sphere",
    "update_diagnostics",
]
