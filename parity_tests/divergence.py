"""Where two traces part: the first step, weight and stage."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from parity_tests.compare import infinity_distance
from parity_tests.identification.identify import Identification, identify
from parity_tests.identification.naming import PARTS, shown
from parity_tests.traces import read_file


@dataclass(frozen=True)
class Divergence:
    """The first difference of two traces.

    Attributes:
      step: from 1; 0 is the start. weight: its name. what: a stage of a step, or the input that differs.
      difference: relative to the largest entry of the first trace's; of the update where that differs.
    """

    step: int
    weight: str
    what: str
    difference: float

    def __str__(self) -> str:
        return f"step {self.step}, weight {self.weight!r}: {self.what}, {self.difference:.2g} apart"


def first_divergence(first: Path, second: Path, *, bound: float = 1e-9) -> Divergence | None:
    """The first step whose inputs or update differ by more than `bound`; None if none does.

    Start, gradients and rates are compared before the update that comes of them. Where these agree and
    the update does not, both traces are identified, and the stage is the first in which they differ.

    Raises:
      ValueError: the two have no weight in common, or one of a common name has two shapes.
    """
    (one, meta), (other, other_meta) = read_file(first), read_file(second)
    names = [name for name in meta["weights"] if name in other_meta["weights"]]
    if not names:
        raise ValueError(
            f"no weight in common: {', '.join(meta['weights'])} and {', '.join(other_meta['weights'])}."
        )
    for name in names:
        shapes = [tuple(m["weights"][name]["shape"]) for m in (meta, other_meta)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{name!r} is {shapes[0]} in the one trace and {shapes[1]} in the other."
            )

    def apart(key: str) -> float:
        return infinity_distance(other[key], one[key])

    for step in range(min(meta["T"], other_meta["T"]) + 1):
        for name in names:
            if step == 0:
                inputs = {"the starts differ": f"param/{name}/0"}
            else:
                inputs = {
                    "the gradients differ": f"grad/{name}/{step}",
                    "the learning rates differ": f"lr/{step}",
                    "the momenta differ": f"mu/{step}",
                }
            for what, key in inputs.items():
                if apart(key) > bound:
                    return Divergence(step, name, what, apart(key))
        for name in names if step else ():
            mine, theirs = (
                a[f"param/{name}/{step}"] - a[f"param/{name}/{step - 1}"] for a in (one, other)
            )
            difference = infinity_distance(theirs, mine)
            if difference > bound:
                return Divergence(step, name, _stage(identify(first), identify(second)), difference)
    return None


def _stage(one: Identification, other: Identification) -> str:
    """The first stage in which two recipes differ, in the order of a step."""
    for part in PARTS:
        if part.of(one.recipe) != part.of(other.recipe):
            return f"{part.name}: {shown(part.of(one.recipe))} and {shown(part.of(other.recipe))}"
    for name in ("weight_decay", "lr_mul"):
        mine, theirs = one.keywords.get(name, 1.0), other.keywords.get(name, 1.0)
        if not np.isclose(mine, theirs, rtol=1e-6):
            return f"{name.replace('_', ' ')}: {mine!r} and {theirs!r}"
    near = (f"{found.name} to {found.difference:.1g}" for found in (one, other))
    return f"no published stage ({' and '.join(near)})"
