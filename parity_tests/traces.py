"""Golden traces: what the original implementations did, read as public keywords and layouts.

`golden/README.md` says how a trace is laid out. Everything dialect-specific about reading one is
here; the drivers (`jax_driver.py`, `torch_driver.py`) see only recipes, layouts and multipliers.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from normuon_core import POLYNOMIALS, RECIPES, MatrixLayout, Recipe

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Weight:
    """One weight of a trace, in the shape in which it is handed to an optimizer.

    Attributes:
      recipe: the trace's recipe with this weight's hyperparameters.
      layout: where the matrices lie in the reshaped weight.
      lr_mul, wd_mul: a number, or an array over the batch axis.
      params: (T + 1, *shape). grads: (T, *shape).
      second_moment: by step, reshaped to be compared flat. momentum: the last, or None.
      bound: relative infinity norm that both frameworks keep to. second_moment_compared: whether the
        original's second moment means the same.
    """

    name: str
    recipe: Recipe
    layout: MatrixLayout
    lr_mul: float | np.ndarray
    wd_mul: float | np.ndarray
    params: np.ndarray
    grads: np.ndarray
    second_moment: dict[int, np.ndarray]
    momentum: np.ndarray | None
    bound: float = 1e-11
    second_moment_compared: bool = True


@dataclass(frozen=True)
class Trace:
    """A trace file: its weights and the schedules they share; `lr` and `mu` are (T,)."""

    name: str
    weights: tuple[Weight, ...]
    lr: np.ndarray
    mu: np.ndarray
    weight_decay: float


def find_traces(folder: Path = GOLDEN) -> list[Path]:
    """The trace files of a folder, sorted by name."""
    return sorted(Path(folder).glob("*.npz"))


def load_trace(path: Path) -> Trace:
    """Reads one trace.

    Raises:
      KeyError: the trace's dialect is not a recipe.
    """
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    meta = json.loads(str(arrays.pop("meta")))
    steps = range(1, meta["T"] + 1)
    hyper = meta["hyperparameters"]
    recipe = _recipe(meta["dialect"], hyper)
    weights = tuple(
        _weight(name, spec, recipe, meta["dialect"], arrays, meta["T"])
        for name, spec in meta["weights"].items()
    )
    return Trace(
        name=Path(path).stem,
        weights=weights,
        lr=np.array([float(arrays[f"lr/{t}"]) for t in steps]),
        mu=np.array([float(arrays[f"mu/{t}"]) for t in steps]),
        weight_decay=float(hyper.get("weight_decay", hyper.get("wd", 0.0))),
    )


def _recipe(dialect: str, hyper: dict) -> Recipe:
    recipe = RECIPES[dialect].override(
        nesterov=hyper.get("nesterov"), beta2=hyper.get("muon_beta2", hyper.get("beta2"))
    )
    scale = recipe.shape_scale
    if dialect.startswith("dion"):
        scale = {"spectral_norm": "spectral", "rms_norm": "match_rms_adamw"}[hyper["adjust_lr"]]
        decay = dataclasses.replace(recipe.decay, cautious=hyper["cautious_wd"])
        recipe = dataclasses.replace(recipe, decay=decay)
        if not hyper["use_polar_express"]:
            polar = dataclasses.replace(
                recipe.polar, coefficients=POLYNOMIALS["you"], norm_scale=1.0
            )
            recipe = dataclasses.replace(recipe, polar=polar)
    if dialect == "torch_muon":
        scale = hyper["adjust_lr_fn"]
    if dialect == "optax_muon" and hyper["consistent_rms"] is not None:
        if hyper["consistent_rms"] != 0.2:
            raise ValueError(f"no shape rule for consistent_rms={hyper['consistent_rms']}")
        scale = "match_rms_adamw"
    return recipe.override(shape_scale=scale)


def _weight(name, spec, recipe, dialect, arrays, last) -> Weight:
    shape = tuple(spec["shape"])
    layout = MatrixLayout(reduction_axis=-1, output_axis=-2)
    lr_mul: float | np.ndarray = 1.0
    label = spec.get("label")
    target = tuple(spec.get("reshape", shape))
    bound, compared = 1e-11, True
    if dialect == "optax_muon":
        layout = MatrixLayout(reduction_axis=0, output_axis=1)
    if dialect == "muon_2024_10" and shape[0] == 3 * shape[1]:
        layout = dataclasses.replace(layout, output_splits=(shape[1],) * 3)
    if "split_sizes" in spec:
        layout = dataclasses.replace(layout, output_splits=tuple(spec["split_sizes"]))
        # dion scales a block before its second moment is taken, so its floor stands elsewhere.
        if recipe.neuron_norm is not None:
            bound, compared = 1e-6, False
    if "num_heads" in spec:
        target = (spec["num_heads"], shape[0] // spec["num_heads"], shape[1])
    if label == "attn":
        # The original takes axis and scale from the stored block, then reinterprets its memory.
        n, rows, columns = shape
        split_rows = dialect != "normuon_2025_11"
        target = (4 * n, rows // 4, columns) if split_rows else (4 * n, rows, columns // 4)
        recipe = _with_axis(recipe, "output" if rows >= columns else "input")
        recipe = recipe.override(shape_scale="none")
        lr_mul = math.sqrt(max(1.0, rows / columns))
    if label == "attn_gate" and dialect == "normuon_2025_12":
        recipe = _with_axis(recipe, "output")
    if label == "mlp_bank" and dialect == "normuon_2026_08":
        lr_mul = np.where(np.arange(target[0]) % 2 == 1, 2.0, 1.0)
    if np.ndim(spec.get("lr_mul", 1.0)) > 0 and label == "mlp_bank":
        lr_mul = 1.0  # the trace spells out what the label stands for
    lr_mul = lr_mul * _multiplier(spec.get("lr_mul", 1.0), target)
    wd_mul = _multiplier(spec.get("wd_mul", 1.0), target)
    momentum = arrays.get(f"momentum/{name}/{last}")
    return Weight(
        name=name,
        recipe=recipe,
        layout=layout,
        lr_mul=lr_mul,
        wd_mul=wd_mul,
        params=np.stack([arrays[f"param/{name}/{t}"].reshape(target) for t in range(last + 1)]),
        grads=np.stack([arrays[f"grad/{name}/{t}"].reshape(target) for t in range(1, last + 1)]),
        second_moment={
            t: arrays[f"second/{name}/{t}"]
            for t in range(1, last + 1)
            if f"second/{name}/{t}" in arrays
        },
        momentum=None if momentum is None else momentum.reshape(target),
        bound=bound,
        second_moment_compared=compared,
    )


def _multiplier(value, shape) -> float | np.ndarray:
    """A number, or one number a matrix; a list of one a stored block counts for all its matrices."""
    if np.ndim(value) == 0:
        return float(value)
    value = np.asarray(value, float).ravel()
    return np.repeat(value, shape[0] // value.size) if len(shape) > 2 else float(value[0])


def _with_axis(recipe: Recipe, axis: str) -> Recipe:
    assert recipe.neuron_norm is not None
    return dataclasses.replace(
        recipe, neuron_norm=dataclasses.replace(recipe.neuron_norm, axis=axis)
    )
