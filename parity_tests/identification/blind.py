"""How often `identify` is right: traces of published recipes with one stage changed, names removed.

`python -m parity_tests.identification.blind SEED` draws a recipe, one of its stages and another
published value of that stage, and lets the PyTorch package make the trace, where
`identify` has only the oracle. Right means the recipe's name, that stage and no other, and its value.

A draw that asks for the impossible is drawn again: a change that the trace does not show, or one after
which another recipe is as near as the first.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track

from normuon_core import POLYNOMIALS, RECIPES, MatrixLayout, Recipe
from normuon_core.polynomials import with_steps
from parity_tests.compare import infinity_distance
from parity_tests.identification import published
from parity_tests.identification.identify import Identification, identify
from parity_tests.identification.naming import changes_of
from parity_tests.torch_driver import run_torch
from parity_tests.traces import Trace, Weight

STEPS = 6
SHAPES = {"tall": (8, 5), "wide": (5, 8), "square": (6, 6), "stack": (2, 5, 7)}
BETA2S = (0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999)
VISIBLE = 1e-8
"""The smallest change of an update, relative to it, that a trace is asked to show."""


@dataclass(frozen=True)
class Draw:
    """A recipe's name, the stage that was changed, and what came of it."""

    name: str
    stage: str
    recipe: Recipe
    in_out: bool
    trace: Trace


def draw(random: np.random.Generator) -> Draw:
    """One recipe with one stage changed, and its trace."""
    while True:
        name = str(random.choice(list(RECIPES)))
        changed = _pick(random, single_changes(RECIPES[name]))
        if changed is None:
            continue
        stage, recipe = changed
        costs = {other: _cost(recipe, other) for other in RECIPES}
        rivals = [
            o
            for o in RECIPES
            if replace(RECIPES[o], source="") != replace(RECIPES[name], source="")
        ]
        if [change.stage for change in changes_of(recipe, name)] != [stage]:
            continue
        if any(costs[rival] <= costs[name] for rival in rivals):
            continue
        in_out = bool(random.random() < 0.5)
        trace = start(random, recipe, in_out)
        if _distance(made_by(trace, RECIPES[name]), made_by(trace, recipe)) >= VISIBLE:
            return Draw(name, stage, recipe, in_out, made_by(trace, recipe))


def _cost(recipe: Recipe, name: str) -> int:
    """The least cost of a recipe's changes, over the records that say the same."""
    spellings = [recipe]
    if recipe.shape_scale == "none":
        # Without a scale there is no inside of it.
        inside = not recipe.decay.inside_scale
        spellings.append(replace(recipe, decay=replace(recipe.decay, inside_scale=inside)))
    return min(sum(c.cost for c in changes_of(spelling, name)) for spelling in spellings)


def _pick(random: np.random.Generator, values: dict[str, list[Any]]):
    """A stage, every one as likely as the others, and one of its values."""
    values = {stage: options for stage, options in values.items() if options}
    stage = str(random.choice(list(values)))
    return stage, values[stage][random.integers(len(values[stage]))]


def single_changes(recipe: Recipe) -> dict[str, list[Recipe]]:
    """Every published change of one stage, by the stage."""

    def of(stage: str, options: list[dict[str, Any]]) -> list[Recipe]:
        record = getattr(recipe, stage)
        return [replace(recipe, **{stage: replace(record, **option)}) for option in options]

    momentum, polar, norm, decay = recipe.momentum, recipe.polar, recipe.neuron_norm, recipe.decay
    result = {
        "momentum rule": of(
            "momentum",
            [{"rule": m.rule} for m in published.MOMENTA if m.nesterov and m.rule != momentum.rule],
        ),
        "Nesterov": of("momentum", [{"nesterov": not momentum.nesterov}]),
        "polynomial": of(
            "polar",
            [{"coefficients": c} for c in POLYNOMIALS.values() if c != polar.coefficients],
        ),
        "steps": of("polar", _other_lengths(polar.coefficients)),
        "eps": of("polar", [{"eps": eps} for eps in (1e-5, 1e-6, 1e-7, 1e-8) if eps != polar.eps]),
        "cautious decay": of("decay", [{"cautious": not decay.cautious}]),
        "decay's place": of("decay", [{"inside_scale": not decay.inside_scale}]),
        "decay's power": of("decay", [{"rate_power": 3 - decay.rate_power}]),
        "scale": [
            recipe.override(shape_scale=rule)
            for rule in published.SHAPE_RULES
            if rule != recipe.shape_scale
        ],
    }
    if norm is not None:
        result["statistic's axis"] = of(
            "neuron_norm", [{"axis": axis} for axis in published.AXES if axis != norm.axis]
        )
        result["beta2"] = of("neuron_norm", [{"beta2": b} for b in BETA2S if b != norm.beta2])
    return result


def _other_lengths(coefficients) -> list[dict[str, Any]]:
    result = []
    for steps in (3, 4, 6, 7, 8, 10):
        try:
            result.append({"coefficients": with_steps(coefficients, steps)})
        except ValueError:  # A table that is not that long.
            continue
    return result


def start(random: np.random.Generator, recipe: Recipe, in_out: bool) -> Trace:
    """Weights, gradients with rows and columns of unequal size, rates and momenta that change."""
    layout = MatrixLayout(-2, -1) if in_out else MatrixLayout(-1, -2)
    weights = []
    for name, shape in SHAPES.items():
        rows, columns = (*shape[:-1], 1), (*shape[:-2], 1, shape[-1])
        grads = random.standard_normal((STEPS, *shape)) * np.exp(random.standard_normal(rows))
        params = np.full((STEPS + 1, *shape), np.nan)
        params[0] = 0.1 * random.standard_normal(shape)
        weights.append(
            Weight(
                name=name,
                recipe=recipe,
                layout=layout,
                lr_mul=1.0,
                wd_mul=1.0,
                params=params,
                grads=grads * np.exp(0.5 * random.standard_normal(columns)) * 0.1,
                second_moment={},
                momentum=None,
            )
        )
    return Trace(
        name="blind",
        weights=tuple(weights),
        lr=random.choice([0.003, 0.01, 0.02]) * random.uniform(0.3, 1.7, STEPS),
        mu=np.linspace(random.uniform(0.8, 0.97), random.uniform(0.8, 0.97), STEPS),
        weight_decay=float(random.choice([0.03, 0.1, 0.25, 1.2])),
    )


def made_by(trace: Trace, recipe: Recipe) -> Trace:
    weights = tuple(replace(weight, recipe=recipe) for weight in trace.weights)
    trajectories = run_torch(replace(trace, weights=weights))
    made = tuple(replace(w, params=trajectories[w.name].params) for w in weights)
    return replace(trace, weights=made)


def _distance(one: Trace, other: Trace) -> float:
    return max(
        infinity_distance(np.diff(a.params, axis=0), np.diff(b.params, axis=0))
        for a, b in zip(one.weights, other.weights, strict=True)
    )


def write(trace: Trace, path: Path) -> None:
    """The trace's arrays, and of its metadata the shapes alone."""
    arrays: dict[str, Any] = {}
    for weight in trace.weights:
        arrays |= {f"param/{weight.name}/{t}": p for t, p in enumerate(weight.params)}
        arrays |= {f"grad/{weight.name}/{t}": g for t, g in enumerate(weight.grads, 1)}
    arrays |= {f"lr/{t}": value for t, value in enumerate(trace.lr, 1)}
    arrays |= {f"mu/{t}": value for t, value in enumerate(trace.mu, 1)}
    shapes = {weight.name: {"shape": weight.params.shape[1:]} for weight in trace.weights}
    np.savez(path, meta=json.dumps({"T": len(trace.lr), "weights": shapes}), **arrays)


def is_right(drawn: Draw, found: Identification) -> bool:
    """Recipe, stage and value; recipes with the same records are one."""
    names = (found.name, *found.also)
    stages = [change.stage for change in found.changes]
    asked = changes_of(drawn.recipe, drawn.name)
    return (
        drawn.name in names
        and stages == [drawn.stage]
        and [change.found for change in found.changes] == [change.found for change in asked]
    )


def attempts(seed: int, count: int) -> Iterator[tuple[Draw, Identification]]:
    """Draws, and what `identify` says of each."""
    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        for index in range(count):
            drawn = draw(random)
            path = Path(folder) / f"{index}.npz"
            write(drawn.trace, path)
            yield drawn, identify(path)


def main(
    seed: Annotated[int, typer.Argument(help="Of the draws.")],
    count: Annotated[int, typer.Option(help="How many traces.")] = 30,
) -> None:
    """Count the traces whose recipe and changed stage are named rightly."""
    console, right = Console(width=110), 0
    for drawn, found in track(attempts(seed, count), total=count, console=Console(stderr=True)):
        good = is_right(drawn, found)
        right += good
        (change,) = changes_of(drawn.recipe, drawn.name)
        said = "; ".join(str(change) for change in found.changes)
        console.print(f"{'right' if good else 'WRONG'}  {drawn.name}, {change}", highlight=False)
        if not good:
            console.print(
                f"       said {found.name}, {said}, {found.difference:.1g}", highlight=False
            )
    console.print(f"{right} of {count} are named rightly")


if __name__ == "__main__":
    typer.run(main)
