"""What `optax_normuon` and `torch_ref` share; imports neither framework."""

from normuon_core.attention_heads import HeadLayout
from normuon_core.layout import MatrixLayout, MatrixView
from normuon_core.polynomials import (
    POLYNOMIALS,
    Coefficients,
    optimal_quintic,
    polar_express,
    relaxed_cubic,
)
from normuon_core.recipes import (
    RECIPES,
    Decay,
    Hyperball,
    Momentum,
    NeuronNorm,
    NormSetting,
    Polar,
    Recipe,
    RowEquilibration,
    find_recipe,
)
from normuon_core.shape_rules import ShapeRule, shape_factor
from normuon_core.version import __version__

__all__ = [
    "POLYNOMIALS",
    "RECIPES",
    "Coefficients",
    "Decay",
    "HeadLayout",
    "Hyperball",
    "MatrixLayout",
    "MatrixView",
    "Momentum",
    "NeuronNorm",
    "NormSetting",
    "Polar",
    "Recipe",
    "RowEquilibration",
    "ShapeRule",
    "__version__",
    "find_recipe",
    "optimal_quintic",
    "polar_express",
    "relaxed_cubic",
    "shape_factor",
]
