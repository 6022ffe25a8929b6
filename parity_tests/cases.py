"""Traces that no original made, for recipes and inputs that the golden traces do not cover."""

import dataclasses

import numpy as np

from normuon_core import RECIPES, MatrixLayout, Recipe
from parity_tests.spectra import SPECTRA
from parity_tests.traces import Trace, Weight

OUT_IN = MatrixLayout(reduction_axis=-1, output_axis=-2)
IN_OUT = MatrixLayout(reduction_axis=-2, output_axis=-1)

SHAPES: dict[str, tuple[tuple[int, ...], MatrixLayout]] = {
    "tall": ((12, 7), OUT_IN),
    "wide": ((7, 12), OUT_IN),
    "square": ((8, 8), OUT_IN),
    "in, out": ((7, 12), IN_OUT),
    "stack": ((3, 6, 9), OUT_IN),
    "split": ((12, 6), dataclasses.replace(OUT_IN, output_splits=(6, 4, 2))),
    "split stack": ((2, 6, 8), dataclasses.replace(IN_OUT, output_splits=(5, 3))),
}


def make_trace(
    recipe: str | Recipe,
    *,
    steps: int = 6,
    shapes: dict[str, tuple[tuple[int, ...], MatrixLayout]] = SHAPES,
    spectra: tuple[str, ...] = tuple(SPECTRA),
    seed: int = 0,
) -> Trace:
    """Gradients of hard spectra on weights of several layouts, rates and momenta that change.

    The gradients of the weights' names run through `spectra`, another one each step. One row of the
    first weight always has a zero gradient, and a third of every weight's entries are exactly zero, so
    that floors and the mask's equality count. `params` beyond the first are left NaN: a trace to be
    run, not to be reproduced.
    """
    rng = np.random.default_rng(seed)
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    weights = []
    for index, (name, (shape, layout)) in enumerate(shapes.items()):
        params = np.full((steps + 1, *shape), np.nan)
        params[0] = np.where(rng.random(shape) < 1 / 3, 0.0, rng.standard_normal(shape))
        kinds = [spectra[(index + step) % len(spectra)] for step in range(steps)]
        grads = np.stack([_draw(rng, kind, shape) for kind in kinds])
        if index == 0:
            grads[:, 2] = 0.0
        per_matrix = rng.uniform(0.5, 2.0, shape[:-2]) if len(shape) > 2 else 1.5
        weights.append(
            Weight(
                name=name,
                recipe=recipe,
                layout=layout,
                lr_mul=per_matrix,
                wd_mul=0.5,
                params=params,
                grads=grads,
                second_moment={},
                momentum=None,
            )
        )
    t = np.arange(steps)
    return Trace(
        name="made",
        weights=tuple(weights),
        lr=0.02 * (1 - 0.5 * t / steps),
        mu=0.85 + 0.1 * t / steps,
        weight_decay=0.3,
    )


def _draw(rng, kind: str, shape) -> np.ndarray:
    batch = int(np.prod(shape[:-2]))
    return np.stack([SPECTRA[kind](rng, *shape[-2:]) for _ in range(batch)]).reshape(shape)
