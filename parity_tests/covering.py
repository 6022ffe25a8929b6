"""A few recipes that have between them every rule that some recipe has.

For tests of what recipes share: arithmetic of a dtype, kernels, names. Recipes that differ in numbers
alone, such as beta2 or an eps, run the same code there. That each recipe is what its source says is held
by the golden traces and by the oracle, for all of them.
"""

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from normuon_core import RECIPES


def rules_of(name: str) -> set[tuple[str, Any]]:
    """(stage or stage's field, its value) of everything in a recipe that is no number."""
    recipe, found = RECIPES[name], set()
    for stage in fields(recipe):
        record = getattr(recipe, stage.name)
        if is_dataclass(record):
            found.add((stage.name, type(record)))
            values = {f"{stage.name}.{f.name}": getattr(record, f.name) for f in fields(record)}
            found |= {(key, value) for key, value in values.items() if not isinstance(value, float)}
        elif stage.name != "source":
            found.add((stage.name, record))
    return found


def covering(names: Iterable[str] = RECIPES) -> list[str]:
    """Of the recipes so named, one after the other the one that brings most rules still missing."""
    left = list(names)
    missing, chosen = set().union(*map(rules_of, left)), []
    while missing:
        chosen.append(max(left, key=lambda name: len(rules_of(name) & missing)))
        missing -= rules_of(chosen[-1])
    return chosen
