"""What an original's hyperparameters are here: every one of them, or the trace is refused.

A trace's metadata has the hyperparameters under the original's own names. Passing over one that is not
known would reproduce another optimizer: six steps in place of five change an update by tens of percent.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from normuon_core import POLYNOMIALS, RECIPES, Recipe
from normuon_core.recipes import Preconditioning
from normuon_core.shape_rules import RMS_TARGET


@dataclass(frozen=True)
class Settings:
    """What a trace's hyperparameters say of all its weights.

    Attributes:
      lr_mul: a factor beside every weight's own. flatten: whether a weight of more than two axes is the
        matrix of its first axis by all others.
    """

    recipe: Recipe
    weight_decay: float = 0.0
    lr_mul: float = 1.0
    flatten: bool = False


_Reader = Callable[[Settings, Any], Settings]


def read_hyperparameters(dialect: str, hyperparameters: Mapping[str, Any]) -> Settings:
    """The dialect's recipe with a trace's hyperparameters.

    Raises:
      ValueError: a dialect that is no recipe, or a hyperparameter (or a value of one) that has no
        translation; the message names it.
    """
    if dialect not in RECIPES:
        raise ValueError(
            f"a trace of {dialect!r}, which is no recipe here; the recipes are {', '.join(RECIPES)}."
        )
    readers = {**_COMMON, **_OWN.get(dialect, {})}
    for name in hyperparameters:
        if name not in readers:
            raise ValueError(
                f"{dialect}: no translation for the hyperparameter {name!r}, with the value"
                f" {hyperparameters[name]!r}; known are {', '.join(sorted(readers))}. Teach it to"
                " parity_tests/dialects.py."
            )
    settings = Settings(RECIPES[dialect])
    # In the tables' order, in which coefficients come before the number of steps that repeats them.
    for name, reader in readers.items():
        if name in hyperparameters:
            try:
                settings = reader(settings, hyperparameters[name])
            except ValueError as error:
                raise ValueError(f"{dialect}: {name}={hyperparameters[name]!r}: {error}") from None
    return settings


def _with_stage(settings: Settings, stage: str, **fields: Any) -> Settings:
    record = getattr(settings.recipe, stage)
    if record is None:
        raise ValueError("the recipe has no neuron normalization")
    return replace(settings, recipe=replace(settings.recipe, **{stage: replace(record, **fields)}))


def _recorded(settings: Settings, value: Any) -> Settings:
    """Learning rate and momentum are passed over here: the trace has them for every step."""
    return settings


def _elsewhere(settings: Settings, value: Any) -> Settings:
    """A hyperparameter that no weight of a trace feels, as those of the AdamW for the rest."""
    return settings


def _weight_decay(settings: Settings, value: float) -> Settings:
    return replace(settings, weight_decay=float(value))


def _nesterov(settings: Settings, value: bool) -> Settings:
    return _with_stage(settings, "momentum", nesterov=bool(value))


def _beta2(settings: Settings, value: float) -> Settings:
    return _with_stage(settings, "neuron_norm", beta2=float(value))


def _eps(settings: Settings, value: float) -> Settings:
    return _with_stage(settings, "polar", eps=float(value))


def _coefficients(settings: Settings, value: Any) -> Settings:
    """One triple for all steps, or one a step."""
    steps = len(settings.recipe.polar.coefficients)
    triples = [value] * steps if not isinstance(value[0], list | tuple) else value
    if any(len(triple) != 3 for triple in triples):
        raise ValueError("a polynomial has three coefficients")
    coefficients = tuple((float(a), float(b), float(c)) for a, b, c in triples)
    return _with_stage(settings, "polar", coefficients=coefficients)


def _steps(settings: Settings, value: int) -> Settings:
    coefficients = settings.recipe.polar.coefficients
    if value == len(coefficients):
        return settings
    if len(set(coefficients)) > 1 or value < 1:
        raise ValueError(
            f"the recipe has {len(coefficients)} different polynomials, one a step; write them out"
        )
    return _with_stage(settings, "polar", coefficients=coefficients[:1] * value)


def _only(*allowed: Any, because: str) -> _Reader:
    def reader(settings: Settings, value: Any) -> Settings:
        if value not in allowed:
            raise ValueError(f"only {' or '.join(map(repr, allowed))} can be repeated: {because}")
        return settings

    return reader


def _shape_rule(names: Mapping[Any, str]) -> _Reader:
    def reader(settings: Settings, value: Any) -> Settings:
        if value not in names:
            raise ValueError(f"the shape rules are {', '.join(map(repr, names))}")
        recipe = settings.recipe.override(shape_scale=names[value])
        return replace(settings, recipe=recipe)

    return reader


def _cautious(settings: Settings, value: bool) -> Settings:
    return _with_stage(settings, "decay", cautious=bool(value))


def _polar_express(settings: Settings, value: bool) -> Settings:
    if value:
        return settings
    return _with_stage(settings, "polar", coefficients=POLYNOMIALS["you"], norm_scale=1.0)


def _flatten(settings: Settings, value: bool) -> Settings:
    if value and settings.recipe.neuron_norm is not None:
        raise ValueError("dion's NorMuon takes its second moment from the weight before flattening")
    return replace(settings, flatten=bool(value))


def _optax_coefficients(settings: Settings, value: Any) -> Settings:
    """A preset's name, too."""
    if isinstance(value, str):
        presets = {"standard": "newton_schulz", "dion": "you"}
        if value not in presets:
            raise ValueError(f"the presets are {', '.join(presets)}")
        value = POLYNOMIALS[presets[value]]
    return _coefficients(settings, value)


def _optax_steps(settings: Settings, value: int) -> Settings:
    """Optax ignores them beside one polynomial a step."""
    several = len(set(settings.recipe.polar.coefficients)) > 1
    return settings if several else _steps(settings, value)


def _preconditioning(settings: Settings, value: str) -> Settings:
    if value not in get_args(Preconditioning):
        raise ValueError(f"the preconditionings are {', '.join(get_args(Preconditioning))}")
    return _with_stage(settings, "polar", preconditioning=value)


def _consistent_rms(settings: Settings, value: float | None) -> Settings:
    if value is None:
        return settings
    recipe = settings.recipe.override(shape_scale="match_rms_adamw")
    return replace(settings, recipe=recipe, lr_mul=float(value) / RMS_TARGET)


_COMMON: dict[str, _Reader] = {
    "lr": _recorded,
    "learning_rate": _recorded,
    "momentum": _recorded,
    "mu": _recorded,
    "beta": _recorded,
    "weight_decay": _weight_decay,
    "wd": _weight_decay,
    "nesterov": _nesterov,
    "beta2": _beta2,
    "eps": _eps,
    "epsilon": _eps,
    "ns_coeffs": _coefficients,
    "ns_coefficients": _coefficients,
    "ns_steps": _steps,
    "backend_steps": _steps,
    "steps": _steps,
}

_DION: dict[str, _Reader] = {
    "use_polar_express": _polar_express,
    "muon_beta2": _beta2,
    "beta1": _elsewhere,
    "beta2": _elsewhere,
    "betas": _elsewhere,
    "cautious_wd": _cautious,
    "adjust_lr": _shape_rule(
        {"spectral_norm": "spectral", "rms_norm": "match_rms_adamw", None: "none"}
    ),
    "flatten": _flatten,
    "use_gram_newton_schulz": _only(False, because="its rounding and its polynomials are others"),
    "newton_schulz_func": _only(None, because="a trace does not have the function"),
}


def _emerging_coefficients(settings: Settings, value: str) -> Settings:
    """A set of Emerging-Optimizers, which divides by max(|u|, 1e-7) before it."""
    names = {"simple": "newton_schulz", "quintic": "you"}
    if value not in names:
        raise ValueError(f"the sets that are the same here are {', '.join(map(repr, names))}")
    polynomial = POLYNOMIALS[names[value]]
    return _with_stage(settings, "polar", coefficients=polynomial, norm_scale=1.0, eps=1e-7)


def _radius(settings: Settings, value: float | None) -> Settings:
    return _with_stage(settings, "hyperball", radius=value)


_HYPERBALL: dict[str, _Reader] = {
    "weight_decay": _only(0.0, because="the original decays the weight before its momentum"),
    "coefficient_type": _emerging_coefficients,
    "num_ns_steps": _only(5, because="the sets are written out for five"),
    "hyperball_radius": _radius,
    # The norm of the update, and so its scale, is divided out.
    "scale_mode": _elsewhere,
    "hyperball_eps": _elsewhere,
}


def _track_3_coefficients(settings: Settings, value: Any) -> Settings:
    """Of track 3 of modded-nanogpt, which adds 1e-7 to the norm before it."""
    settings = _coefficients(settings, value)
    return _with_stage(settings, "polar", norm_scale=1.0, eps=1e-7, eps_rule="add")


def _variance_axis(settings: Settings, value: str) -> Settings:
    return _with_stage(settings, "neuron_norm", axis=value)


def _variance_eps(settings: Settings, value: float) -> Settings:
    return _with_stage(settings, "neuron_norm", eps=float(value))


_NORMUON_H: dict[str, _Reader] = {
    "ns_coefficients": _track_3_coefficients,
    "variance_axis": _variance_axis,
    "eps": _variance_eps,
}

_OWN: dict[str, dict[str, _Reader]] = {
    "muon_2024_10": {
        "nesterov": _only(True, because="without Nesterov the original forgets its momentum"),
        "backend": _only("newtonschulz5", because="the other backend is an SVD"),
    },
    "moonlight": {"adamw_betas": _elsewhere, "adamw_eps": _elsewhere},
    "dion_muon": _DION,
    "muon_h": _HYPERBALL,
    "normuon_h": _NORMUON_H,
    "dion_normuon": _DION,
    "torch_muon": {
        "adjust_lr_fn": _shape_rule(
            {None: "original", "original": "original", "match_rms_adamw": "match_rms_adamw"}
        )
    },
    "optax_muon": {
        "ns_coeffs": _optax_coefficients,
        "ns_steps": _optax_steps,
        "consistent_rms": _consistent_rms,
        "preconditioning": _preconditioning,
        "adaptive": _only(False, because="there is no dual norm"),
        "weight_decay_mask": _only(None, because="a trace does not have the mask"),
        "mu_dtype": _only(None, "float64", because="traces are float64"),
        **{
            f"adam_{name}": _elsewhere
            for name in ("b1", "b2", "eps_root", "weight_decay", "learning_rate")
        },
    },
}
