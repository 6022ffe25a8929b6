"""The common format of a run's arrays: which there are, under which names, and what is said of them.

| name | shape | dtype |
| --- | --- | --- |
| `metadata` | (bytes,) | uint8: JSON, see `Kept` |
| `count` | () | int64: steps that the schedules of the rates have counted |
| `step/NAME` | () | int64: steps of the parameter |
| `momentum/NAME` | the parameter's | `momentum_dtype`; of int8 float32, or the parameter's if wider |
| `second_moment/NAME` | the parameter's, 1 on reduced axes | float32, or the parameter's if wider |
| `radius/NAME` | the parameter's, 1 on both sides of matrices | the same |
| `exp_avg/NAME`, `exp_avg_sq/NAME` | the parameter's | AdamW's moments |
| `gradient_sum/NAME` | the parameter's | float32, or the parameter's if wider: AdamW's |
| `remainder/NAME` | the parameter's | uint16: low bits beside a bfloat16 parameter |
| `parameter/NAME` | the parameter's | its own |

AdamW that updates at every k-th step (`adam_every`) has a `gradient_sum`, of the steps since its last
update. Its bias correction counts updates, which are `step` // k.

A momentum in int8 is written as the floats that it stands for, which do not depend on how a framework
lays out blocks. Where the blocks are the same, `state_from_arrays` makes the same integers of them.

Where some blocks of a split weight have one number for each output and others one for each input, each
block's second moment has a name: `second_moment.0/NAME`, `second_moment.1/NAME`.

All are row-major arrays of NumPy's and of `ml_dtypes`, so `numpy.savez(file, **arrays)` and
`safetensors.numpy.save_file(arrays, file)` write them as they are. (safetensors 0.8 writes the memory of
an array that is not row-major, and with it the numbers in another order.) NumPy reads bfloat16 back as
two bytes without a name, which are taken for bfloat16 here.
"""

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from normuon_core.layout import MatrixView

FORMAT, VERSION = "optax-normuon run", 1

MATRIX, ADAMW = "normuon", "adamw"

Arrays = dict[str, np.ndarray]

Matrices = tuple[tuple[int, int, int], ...]
"""How many matrices of which (out, in): (number, out, in) each, sorted."""


@dataclass(frozen=True)
class Kept:
    """What the metadata say of one parameter.

    Attributes:
      settings: of its optimizer, as JSON has them: "optimizer", and a recipe's fields or AdamW's. What
        is not known, as a momentum that follows a schedule, is left out.
      matrices: those of the parameter; empty for AdamW, and where they are not known.
    """

    settings: Mapping[str, Any]
    matrices: Matrices = ()


def matrices_of(view: MatrixView) -> Matrices:
    """The matrices of one weight."""
    return sum_of_matrices([[(view.matrices(run), run.size, view.inputs)] for run in view.runs])


def sum_of_matrices(parts: Iterable[Iterable[tuple[int, int, int]]]) -> Matrices:
    """The matrices of several weights, or blocks, together."""
    counts: dict[tuple[int, int], int] = {}
    for count, outputs, inputs in itertools.chain.from_iterable(parts):
        counts[outputs, inputs] = counts.get((outputs, inputs), 0) + count
    return tuple(sorted((count, *sides) for sides, count in counts.items()))


def written_matrices(matrices: Matrices) -> str:
    """The matrices in words."""
    return " and ".join(
        f"{count} matrices of ({outputs}, {inputs})"
        if count > 1
        else f"one of ({outputs}, {inputs})"
        for count, outputs, inputs in matrices
    )


def written_metadata(kept: Mapping[str, Kept]) -> np.ndarray:
    """The array `metadata`."""
    settings: list[Mapping[str, Any]] = []
    parameters = {}
    for name, own in kept.items():
        if own.settings not in settings:
            settings.append(own.settings)
        parameters[name] = {
            "settings": settings.index(own.settings),
            "matrices": own.matrices,
        }
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "parameters": parameters,
    }
    return np.frombuffer(json.dumps(content).encode(), np.uint8).copy()


def read_metadata(arrays: Mapping[str, np.ndarray]) -> dict[str, Kept]:
    """What is said of each parameter, by name.

    Raises:
      ValueError: arrays without metadata, of another program, or of a newer version.
    """
    if "metadata" not in arrays:
        raise ValueError(
            f"the arrays have no 'metadata' (there are {_some(arrays)}); hand over all that"
            " state_to_arrays made, and translate another optimizer's checkpoint first (docs/moving.md)."
        )
    content = json.loads(bytes(np.asarray(arrays["metadata"])))
    if content.get("format") != FORMAT or content.get("version", 0) > VERSION:
        raise ValueError(
            f"the metadata are of format={content.get('format')!r}, version={content.get('version')},"
            f" and this program reads {FORMAT!r} up to version {VERSION}; update it to the release that"
            " wrote the file."
        )
    return {
        name: Kept(content["settings"][own["settings"]], tuple(map(tuple, own["matrices"])))
        for name, own in content["parameters"].items()
    }


def as_read(array: np.ndarray) -> np.ndarray:
    """An array as it was written, row-major; NumPy reads bfloat16 as two bytes without a name."""
    array = np.asarray(array, order="C")
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.dtype("V2") else array


def by_parameter(arrays: Mapping[str, np.ndarray]) -> dict[str, Arrays]:
    """The arrays of each parameter, by the first part of their names: `momentum`, `step`, ..."""
    result: dict[str, Arrays] = {}
    for key in arrays:
        kind, slash, name = key.partition("/")
        if slash:
            result.setdefault(name, {})[kind] = as_read(arrays[key])
    return result


def whole_array(arrays: Arrays) -> np.ndarray:
    """One of a parameter's arrays that has the parameter's shape; statistics are smaller."""
    return max((array for kind, array in arrays.items() if kind != "step"), key=np.size)


def _some(names) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "") or "none"
