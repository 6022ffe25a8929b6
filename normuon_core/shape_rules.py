"""How an orthogonalized update is scaled by the shape of its matrix."""

import math
from typing import Literal, cast

from normuon_core.hyperparameters import check_choice

ShapeRule = Literal["original", "match_rms_adamw", "spectral", "max_dim", "rms", "none"]

RMS_TARGET = 0.2
"""The root mean square of an AdamW update in practice. Source: Moonlight, arXiv 2502.16982."""

RMS_FLOOR = 1e-10
"""What the `rms` rule divides a vanished update by. Source: NorMuon, arXiv 2510.05491."""


def check_shape_rule(rule: str) -> ShapeRule:
    """`rule` itself if it is one.

    Raises:
      ValueError: an unknown rule; the message has the nearest known one.
    """
    check_choice("shape scale", rule, ShapeRule)
    return cast(ShapeRule, rule)


def shape_factor(rule: ShapeRule, outputs: int, inputs: int) -> float:
    """The factor k of an (outputs, inputs) matrix.

    For `rms` it is the root mean square's numerator 0.2 sqrt(outputs * inputs), to be divided by
    max(|v|_F, `RMS_FLOOR`).
    `original` and `match_rms_adamw` are PyTorch's names (torch.optim.Muon's `adjust_lr_fn`).
    """
    match rule:
        case "original":
            return math.sqrt(max(1.0, outputs / inputs))
        case "match_rms_adamw":
            return RMS_TARGET * math.sqrt(max(outputs, inputs))
        case "spectral":
            return math.sqrt(outputs / inputs)
        case "max_dim":
            return math.sqrt(max(outputs, inputs))
        case "rms":
            return RMS_TARGET * math.sqrt(outputs * inputs)
        case "none":
            return 1.0
