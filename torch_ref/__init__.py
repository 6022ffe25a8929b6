"""NorMuon and the Muon family in PyTorch, the twin of `optax_normuon`: one function a stage."""

from normuon_core import MatrixLayout
from torch_ref.adamw import adamw
from torch_ref.description import describe
from torch_ref.momentum import bias_corrected_momentum, heavy_ball_momentum, lerp_momentum
from torch_ref.neuron_norm import normalize_neurons
from torch_ref.optimizer import NorMuon
from torch_ref.orthogonalization import polar_factor
from torch_ref.parameter_groups import param_groups
from torch_ref.product import product
from torch_ref.remainder import join_remainder, split_remainder
from torch_ref.shape_scaling import scale_by_shape
from torch_ref.weight_decay import add_cautious_weight_decay

__all__ = [
    "MatrixLayout",
    "NorMuon",
    "adamw",
    "add_cautious_weight_decay",
    "bias_corrected_momentum",
    "describe",
    "heavy_ball_momentum",
    "join_remainder",
    "lerp_momentum",
    "normalize_neurons",
    "param_groups",
    "polar_factor",
    "product",
    "scale_by_shape",
    "split_remainder",
]
