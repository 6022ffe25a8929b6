"""What of an optimizer's settings decides how its state goes on, written down and compared."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from normuon_core.moving.format import ADAMW, MATRIX
from normuon_core.recipes import RECIPES, Recipe

_KEYWORDS = {
    "momentum.momentum": "momentum",
    "momentum.nesterov": "nesterov",
    "neuron_norm.beta2": "beta2",
    "shape_scale": "shape_scale",
    "polar.coefficients": "coefficients",
    "polar.eps": "eps",
    "momentum_dtype": "momentum_dtype",
    "b1": "adam_b1",
    "b2": "adam_b2",
    "eps": "adam_eps",
    "eps_root": "adam_eps_root",
    "nesterov": "adam_nesterov",
    "cautious": "adam_cautious",
    "every": "adam_every",
}
"""By which keyword of either framework's optimizer a setting is given; the others are the recipe's."""

_UNCHANGEABLE = {
    "every": "the sum of gradients is of its steps, and the bias correction counts updates by it",
}
"""Settings that no run can go on without, and why."""


def settings_of_recipe(recipe: Recipe) -> dict[str, Any]:
    """The settings of a recipe's matrices; a momentum that is no number is left out."""
    # Not `dataclasses.asdict`, which copies values, and a traced momentum is none to be copied.
    fields = {
        key: vars(value) if dataclasses.is_dataclass(value) else value
        for key, value in vars(recipe).items()
        if key != "source"
    }
    return {"optimizer": MATRIX} | _plain(fields)


def settings_of_int8(in_int8: bool) -> dict[str, Any]:
    """Whether a matrix's momentum is kept in int8; the dtype of one in floats is that of its array."""
    return {"momentum_dtype": "int8" if in_int8 else None}


def settings_of_adamw(*, every: int | None = None, **keywords: Any) -> dict[str, Any]:
    """AdamW's: b1, b2, eps, eps_root, nesterov, cautious; and every, of which None is 1."""
    return {"optimizer": ADAMW, "every": int(every or 1)} | _plain(keywords)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back, without what is no plain value, as a traced momentum."""
    result = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            result[key] = _plain(value)
        elif value is None or isinstance(value, bool | int | float | str | list | tuple):
            result[key] = json.loads(json.dumps(value))
    return result


def differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """(setting, in the file, here) where both know a setting and differ."""
    for key in found.keys() & wanted.keys():
        old, new = found[key], wanted[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            for inner, *values in differences(old, new):
                yield f"{key}.{inner}", *values
        elif old != new:
            yield key, old, new


def check_settings(
    name: str, found: Mapping[str, Any], wanted: Mapping[str, Any], changed: Collection[str]
) -> None:
    """Refuses state that the optimizer would continue by other settings.

    Args:
      name: the parameter's. found: the file's. wanted: the optimizer's.
      changed: settings that may differ, by the names that the error has for them. AdamW's `every` never
        may.
    """
    allowed = {*changed} - _UNCHANGEABLE.keys()
    unlike = sorted(each for each in differences(found, wanted) if each[0] not in allowed)
    if not unlike:
        return
    lines = [
        f"{key} is {_shown(old)} in the file and {_shown(new)} here" for key, old, new in unlike
    ]
    keywords = [f"{_KEYWORDS[key]}={old!r}" for key, old, _ in unlike if key in _KEYWORDS]
    recipe = _recipe_name(found)
    if recipe is not None and any(key not in _KEYWORDS for key, *_ in unlike):
        keywords = [f"recipe={recipe!r}"]
    if keywords:
        remedy = f"make the optimizer with {', '.join(keywords)} to continue that run"
    else:
        remedy = "make the optimizer with the recipe of that run"
    fixed = [key for key, *_ in unlike if key in _UNCHANGEABLE]
    if fixed:
        remedy += "".join(f" ({key} cannot be changed: {_UNCHANGEABLE[key]})" for key in fixed)
    else:
        remedy += f", or give changed={[key for key, *_ in unlike]} to go on with those here"
    raise ValueError(
        f"{name}: the file's run had other settings: {'; '.join(lines)}. Please {remedy}."
    )


def _recipe_name(settings: Mapping[str, Any]) -> str | None:
    """The published recipe that has these settings, apart from those with a keyword of their own."""
    for name, recipe in RECIPES.items():
        unlike = differences(settings, settings_of_recipe(recipe))
        if all(key in _KEYWORDS for key, *_ in unlike):
            return name
    return None


def _shown(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
