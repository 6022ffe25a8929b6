"""Peak learning rates for each phase and optimizer: where to begin, for the small default model.

Pretraining's are the best of a recorded grid. `python -m examples.sweep` measures those of the other
phases, see `docs/training.md`. What makes rates comparable is the size of the update, not the rate: an
AdamW update has a root mean square of 0.2 to 0.4 of its rate, a Muon update (`original` scaling) of
rate / sqrt(inputs).
"""

import dataclasses
import math
from typing import TypeVar

from examples.optimizers import OPTAX_MUON, OptimizerConfig
from normuon_core.shape_rules import shape_factor
from optax_normuon import RECIPES


@dataclasses.dataclass(frozen=True)
class Rates:
    """Peak learning rates. `adam_learning_rate` is that of the AdamW beside Muon or NorMuon, for
    embedding, head and norms; AdamW alone has one rate for everything and leaves it None."""

    learning_rate: float
    adam_learning_rate: float | None = None


Presets = dict[str, Rates]
Config = TypeVar("Config", bound=OptimizerConfig)

# Searched by `python -m examples compare --tune True` (learning_rates.json). Embedding and head alone
# bear, and like, twice the rate that AdamW takes for a whole model.
PRETRAIN: Presets = {
    "adamw": Rates(4e-3),
    "muon": Rates(0.02, 8e-3),
    "normuon": Rates(0.04, 8e-3),
    OPTAX_MUON: Rates(0.02, 8e-3),
}

# Of nGPT: the matrices' rate is about the angle by which their slices turn in a step. The best of a
# sweep of both rates together (`docs/training.md`).
NGPT: Presets = {
    "adamw": Rates(8e-3, 8e-3),
    "muon": Rates(0.04, 8e-3),
    "normuon": Rates(0.04, 8e-3),
}

# Half of pretraining's for the matrices and the AdamW beside them, all of it for AdamW alone: a small
# model has a new format to learn from its head on, and little to forget.
SFT: Presets = {
    "adamw": Rates(4e-3),
    "muon": Rates(0.01, 4e-3),
    "normuon": Rates(0.02, 4e-3),
    OPTAX_MUON: Rates(0.01, 4e-3),
}

# A twentieth of fine-tuning's for the matrices, a fortieth for AdamW: the loss compares sums over whole
# answers, so small changes of every token's log-probability decide it. Higher rates bring it lower
# still, and lose answers that were right (the sweep in `docs/training.md`).
DPO: Presets = {
    "adamw": Rates(1e-4),
    "muon": Rates(5e-4, 1e-4),
    "normuon": Rates(1e-3, 1e-4),
    OPTAX_MUON: Rates(5e-4, 1e-4),
}


def with_preset(config: Config, presets: Presets, *, width: int) -> Config:
    """The configuration with the preset's rates where it has none.

    A recipe without an entry takes the rate of Muon or NorMuon, scaled so that a square matrix of the
    model's width has an update of the same size.
    """
    rates = presets.get(config.optimizer) or _like_ours(config.optimizer, presets, width)
    rate, adam_rate = config.learning_rate, config.adam_learning_rate
    return dataclasses.replace(
        config,
        learning_rate=rates.learning_rate if rate is None else rate,
        adam_learning_rate=rates.adam_learning_rate if adam_rate is None else adam_rate,
    )


def _like_ours(name: str, presets: Presets, width: int) -> Rates:
    own = presets["muon" if RECIPES[name].neuron_norm is None else "normuon"]
    return Rates(own.learning_rate * same_update(name, width), own.adam_learning_rate)


def same_update(name: str, width: int) -> float:
    """By what a rate of Muon or NorMuon is multiplied, for another recipe's update of the same size.

    The size is that of a square matrix of the model's width.
    """
    if name not in RECIPES:
        return 1.0
    scale = RECIPES[name].shape_scale
    factor = shape_factor(scale, width, width)
    if scale == "rms":
        factor /= math.sqrt(width)  # the norm of an orthogonal matrix, by which this rule divides
    return 1 / factor
