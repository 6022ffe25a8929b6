"""Optimizers by name, with one clipping and one shape of the learning rate for all."""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import optax_normuon
from examples.errors import BadInput
from examples.mesh import specs_on
from examples.schedules import momentum_ramp, warm_stay_decay
from optax_normuon import RECIPES

OPTAX_MUON = "optax.contrib.muon"
NAMES = ("adamw", OPTAX_MUON, *RECIPES)
MomentumDtype = Literal["float32", "bfloat16", "int8"]
MOMENTUM_DTYPES = get_args(MomentumDtype)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, and its rates over the run."""

    optimizer: str = "normuon"
    """adamw, optax.contrib.muon, or a recipe of optax_normuon: normuon, muon, moonlight, ..."""
    learning_rate: float | None = None
    """Peak rate: of the matrices, or of everything with adamw. None: the preset of this phase."""
    adam_learning_rate: float | None = None
    """Peak rate of the AdamW beside the matrices, for embedding, head and norms. None as above."""
    weight_decay: float = 0.0
    """Of the matrices, or of everything with adamw, as the recipe has it."""
    momentum: float | None = None
    """Of the matrices. None is the recipe's own."""
    momentum_dtype: MomentumDtype = "float32"
    """In which the matrices' momentum is kept: 4, 2 or about 1 byte a parameter."""
    momentum_low: float = 0.85
    """Where momentum starts before its warmup and ends after its cooldown."""
    momentum_warmup: int = 0
    """Steps over which momentum rises."""
    momentum_cooldown: int = 0
    """Last steps over which momentum falls."""
    warmup: float = 0.05
    """Fraction of the steps over which the rates rise."""
    decay: float = 0.6
    """Fraction of the steps over which the rates fall to zero."""
    clip: float = 1.0
    """Global norm that gradients are clipped to; 0 leaves them as they are."""
    accumulation: int = 1
    """Parts in which a batch is taken, one after the other; the update is the same."""

    def __post_init__(self):
        if self.optimizer not in NAMES:
            near = difflib.get_close_matches(self.optimizer, NAMES, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(NAMES)}."
            raise BadInput(f"optimizer={self.optimizer!r} is unknown: {hint}")
        if self.momentum_dtype not in MOMENTUM_DTYPES:
            raise BadInput(
                f"momentum_dtype={self.momentum_dtype!r} is none of {', '.join(MOMENTUM_DTYPES)}."
            )
        if self.momentum_dtype != "float32" and self.optimizer not in RECIPES:
            raise BadInput(
                f"momentum_dtype={self.momentum_dtype!r}: {self.optimizer} keeps its momentum in float32"
                " here; take a recipe of optax_normuon."
            )
        if self.accumulation < 1:
            raise BadInput(f"accumulation={self.accumulation}: a batch has one part at least.")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            raise BadInput(
                f"warmup={self.warmup} and decay={self.decay} are fractions of the steps that add up to"
                " 1 at most."
            )

    @property
    def peaks(self) -> dict[str, float | None]:
        """Peak rates by the name under which a run logs them."""
        if self.optimizer == "adamw":
            return {"lr_adamw": self.learning_rate}
        return {"lr_muon": self.learning_rate, "lr_adamw": self.adam_learning_rate}

    def transformation(
        self, followed: Mapping[str, optax.Schedule], mesh: Mesh | None
    ) -> optax.GradientTransformation:
        """What follows clipping.

        Args:
          followed: the schedules of `peaks`, and `momentum` for a recipe.
        """
        make: Callable = {"adamw": _adamw, OPTAX_MUON: _optax_muon}.get(self.optimizer, _recipe)
        return make(self, followed, mesh)

    def description(self, params: Any) -> str:
        """Which optimizer trains what, with each one's share of the parameters."""
        if self.optimizer == "adamw":
            return "adamw trains every parameter."
        ours = self.optimizer in RECIPES
        recipe = self.optimizer if ours else "muon"
        table = optax_normuon.describe(params, recipe=recipe, compute_dtype=compute_dtype())
        return table if ours else f"{self.optimizer} on what is Muon's here:\n{table}"


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """A transformation, and what it follows.

    Attributes:
      tx: behind a clipped gradient.
      followed: schedules by the name under which a run logs them.
    """

    tx: optax.GradientTransformation
    followed: dict[str, optax.Schedule]


@functools.cache
def make_optimizer(config: OptimizerConfig, steps: int, mesh: Mesh | None = None) -> Optimizer:
    """The optimizer of a run of so many steps.

    Raises:
      BadInput: the rates are not given, or momentum is to change where it cannot.
    """
    if config.learning_rate is None:
        raise BadInput("learning_rate is missing: give it, or take a phase's preset.")
    followed = {}
    for name, peak in config.peaks.items():
        if peak is None:
            raise BadInput(f"{config.optimizer} lacks adam_learning_rate, of the AdamW beside it.")
        followed[name] = warm_stay_decay(peak, steps, warmup=config.warmup, decay=config.decay)
    if config.optimizer in RECIPES:
        followed["momentum"] = _momentum(config, steps)
    elif config.momentum_warmup or config.momentum_cooldown:
        raise BadInput(f"{config.optimizer} takes no schedule of its momentum.")
    inner = config.transformation(followed, mesh)
    return Optimizer(optax.chain(clipping(config), inner), followed)


def clipping(config: OptimizerConfig) -> optax.GradientTransformation:
    """Of gradients, before everything else."""
    return optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()


def compute_dtype():
    """Of the polar factor. On CPUs bfloat16 takes longer than float32: casts, and no faster products."""
    return jnp.float32 if jax.default_backend() == "cpu" else None


def is_matrix(path) -> bool:
    """Whether a parameter of `examples.gpt` is one of the blocks' matrices."""
    names = [str(getattr(key, "key", key)) for key in path]
    return names[0] == "blocks" and names[-1] == "kernel"


def _momentum(config: OptimizerConfig, steps: int) -> optax.Schedule:
    high = config.momentum
    if high is None:
        high = RECIPES[config.optimizer].momentum.momentum
    if not (config.momentum_warmup or config.momentum_cooldown):
        return optax.constant_schedule(high)
    if config.momentum_warmup + config.momentum_cooldown > steps:
        raise BadInput(
            f"momentum_warmup={config.momentum_warmup} and momentum_cooldown={config.momentum_cooldown}"
            f" take more than the run's {steps} steps."
        )
    ends = dict(warmup=config.momentum_warmup, cooldown=config.momentum_cooldown)
    return momentum_ramp(config.momentum_low, high, steps, **ends)


def _adamw(config, followed, mesh):
    """AdamW on every parameter, with the betas and epsilon that it has beside the matrices too."""
    del mesh  # elementwise: every part of a parameter has all that it needs
    decay = config.weight_decay
    return optax.adamw(followed["lr_adamw"], b1=0.9, b2=0.95, eps=1e-10, weight_decay=decay)


def _recipe(config, followed, mesh):
    """A recipe's optimizer on the matrices of the blocks, AdamW on the rest."""
    return optax_normuon.normuon(
        followed["lr_muon"],
        recipe=config.optimizer,
        momentum=followed["momentum"],
        weight_decay=config.weight_decay,
        adam_learning_rate=followed["lr_adamw"],
        momentum_dtype=config.momentum_dtype,
        compute_dtype=compute_dtype(),
        param_specs=specs_on(mesh),
    )


def _optax_muon(config, followed, mesh):
    """Optax's own Muon on the same matrices."""
    del mesh  # left to XLA's partitioner

    def dimensions(params):
        sides = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: sides if is_matrix(path) else None, params
        )

    return optax.contrib.muon(
        followed["lr_muon"],
        beta=0.95 if config.momentum is None else config.momentum,
        weight_decay=config.weight_decay,
        adam_b2=0.95,
        adam_learning_rate=followed["lr_adamw"],
        muon_weight_dimension_numbers=dimensions,
    )
