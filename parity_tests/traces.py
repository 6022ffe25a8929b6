"""Golden traces: what the original implementations did, read as public keywords and layouts.

`golden/README.md` says how a trace is laid out. Everything dialect-specific about reading one is
here; the drivers (`jax_driver.py`, `torch_driver.py`) see only recipes, layouts and multipliers.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from normuon_core import MatrixLayout, Recipe
from parity_tests.dialects import Settings, read_hyperparameters

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
      ValueError: the trace's dialect is not a recipe, or its metadata say something that has no
        translation, of the optimizer or of a weight; the message names file and key.
    """
    arrays, meta = read_file(path)
    try:
        settings = read_hyperparameters(meta["dialect"], meta["hyperparameters"])
        return read_as(meta["dialect"], settings, arrays, meta, name=Path(path).stem)
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from None


def read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the metadata of a trace, `.npz` or `.safetensors`."""
    if Path(path).suffix == ".safetensors":
        with safetensors_library().safe_open(path, framework="numpy") as file:
            meta = json.loads(file.metadata()["meta"])
            # The file is no mapping: it has keys, and cannot be iterated over.
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, meta
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(str(arrays.pop("meta")))


def safetensors_library() -> ModuleType:
    """The module, with its `numpy`.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        import safetensors.numpy  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "a trace called .safetensors needs the library of that name: pip install safetensors, or"
            " name the file .npz."
        ) from error
    return safetensors


def read_as(
    dialect: str,
    settings: Settings,
    arrays: dict[str, np.ndarray],
    meta: dict[str, Any],
    *,
    name: str,
) -> Trace:
    """The trace as one of a dialect: its labels and shapes are what they are there.

    Raises:
      ValueError: a key or a shape of a weight has no reading there.
    """
    steps = range(1, meta["T"] + 1)
    return Trace(
        name=name,
        weights=tuple(
            _weight(weight, spec, settings, dialect, arrays, meta["T"])
            for weight, spec in meta["weights"].items()
        ),
        lr=np.array([float(arrays[f"lr/{t}"]) for t in steps]),
        mu=np.array([float(arrays[f"mu/{t}"]) for t in steps]),
        weight_decay=settings.weight_decay,
    )


_OF_A_WEIGHT = {"shape", "label", "reshape", "split_sizes", "num_heads", "lr_mul", "wd_mul"}


def _weight(name, spec, settings: Settings, dialect, arrays, last) -> Weight:
    unknown = sorted(set(spec) - _OF_A_WEIGHT)
    if unknown:
        raise ValueError(
            f"{dialect}: no translation for {unknown[0]!r}, with the value {spec[unknown[0]]!r}, of the"
            f" weight {name!r}."
        )
    recipe = settings.recipe
    shape = tuple(spec["shape"])
    layout = MatrixLayout(reduction_axis=-1, output_axis=-2)
    lr_mul: float | np.ndarray = settings.lr_mul
    label = spec.get("label")
    target = tuple(spec.get("reshape", shape))
    if settings.flatten:
        target = (target[0], math.prod(target[1:]))
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
    if dialect == "normuon_h" and shape[0] > shape[1]:
        # The original's shape factor stands before its second moment, and cancels behind it.
        compared = False
    if "num_heads" in spec:
        target = (spec["num_heads"], shape[0] // spec["num_heads"], shape[1])
    if label == "attn":
        # The original takes axis and scale from the stored block, then reinterprets its memory.
        n, rows, columns = shape
        split_rows = dialect != "normuon_2025_11"
        target = (4 * n, rows // 4, columns) if split_rows else (4 * n, rows, columns // 4)
        recipe = _with_axis(recipe, "output" if rows >= columns else "input")
        recipe = recipe.override(shape_scale="none")
        lr_mul = lr_mul * math.sqrt(max(1.0, rows / columns))
    if label == "attn_gate" and dialect == "normuon_2025_12":
        recipe = _with_axis(recipe, "output")
    # A trace may also spell out what the label stands for.
    spelt_out = np.ndim(spec.get("lr_mul", 1.0)) > 0
    if label == "mlp_bank" and dialect == "normuon_2026_08" and not spelt_out:
        lr_mul = lr_mul * np.where(np.arange(target[0]) % 2 == 1, 2.0, 1.0)
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
    if recipe.neuron_norm is None:
        raise ValueError("an axis of the second moment for a recipe without one")
    return dataclasses.replace(
        recipe, neuron_norm=dataclasses.replace(recipe.neuron_norm, axis=axis)
    )
