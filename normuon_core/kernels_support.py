"""Which recipes the kernels can run.

The kernels know every rule by name. A recipe that has another one, or a field that they have never heard
of, is run by the framework's own operations: both packages ask here before they take the kernels.
"""

from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

from normuon_core.recipes import (
    Decay,
    Momentum,
    NeuronNorm,
    NormSetting,
    Polar,
    Recipe,
    RowEquilibration,
)

_ANY = None
"""Values that the kernels take in arrays, as scalars, or not at all."""

_KNOWN: dict[type, dict[str, tuple[Any, ...] | None]] = {
    Recipe: {
        "momentum": _ANY,
        "polar": _ANY,
        "neuron_norm": _ANY,
        "decay": _ANY,
        "shape_scale": ("original", "match_rms_adamw", "spectral", "max_dim", "rms", "none"),
        "source": _ANY,
        "row_equilibration": _ANY,
        "norm_setting": _ANY,
    },
    Momentum: {
        "rule": ("lerp", "heavy_ball", "bias_corrected"),
        "momentum": _ANY,
        "nesterov": _ANY,
    },
    Polar: {
        "coefficients": _ANY,
        "norm_scale": _ANY,
        "eps": _ANY,
        "eps_rule": ("add", "max"),
        "preconditioning": ("frobenius",),
    },
    NeuronNorm: {
        "beta2": _ANY,
        "axis": ("output", "input", "longer"),
        "eps": _ANY,
        "eps_rule": ("add", "max"),
        "rescale": ("add", "max", None),
    },
    RowEquilibration: {"eps": _ANY},
    NormSetting: {"eps": _ANY},
    Decay: {"cautious": _ANY, "inside_scale": _ANY, "rate_power": _ANY},
}
"""What of each record's fields the kernels can run. The literals of `normuon_core.recipes` are not used
here: a rule that is added there is no rule of the kernels before somebody writes it into them."""


@dataclass(frozen=True)
class KernelsSupport:
    """Whether the kernels can run a recipe; in a condition it is true if they can.

    Attributes:
      lacking: what they cannot run, each as `momentum.rule='new'`.
    """

    lacking: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.lacking

    def __str__(self) -> str:
        if self:
            return "the kernels can run this recipe"
        return f"the kernels cannot run {', '.join(self.lacking)}"


def kernels_support(recipe: Recipe | Polar, *, momentum_dtype: str | None = None) -> KernelsSupport:
    """Whether the kernels can run a recipe, or the polar factor alone, and what they lack.

    A field that they do not know is no obstacle while it has its default, which stands for the recipes
    that were there before it.

    Args:
      momentum_dtype: the name of the dtype in which momentum is kept. No kernel reads int8 with scales.
    """
    scaled = ["momentum_dtype='int8'"] if momentum_dtype == "int8" else []
    return KernelsSupport((*_lacking(recipe), *scaled))


def _lacking(record: Any, name: str = "") -> list[str]:
    """What the kernels lack of a record that is the recipe's field `name`."""
    known = next((own for kind, own in _KNOWN.items() if isinstance(record, kind)), None)
    if known is None:
        return [f"{name}={record!r}"]
    found = []
    for field in fields(record):
        value, own = getattr(record, field.name), f"{name}.{field.name}".lstrip(".")
        choices = known.get(field.name, (_default(field),))
        if choices is not _ANY:
            found += [] if value in choices else [f"{own}={value!r}"]
        elif is_dataclass(value):
            found += _lacking(value, own)
    return found


def _default(field: Field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()
