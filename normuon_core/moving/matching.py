"""The arrays of a file against those that an optimizer keeps: what does not fit is an error by name."""

import difflib
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from normuon_core.moving.format import (
    ADAMW,
    MATRIX,
    Arrays,
    Kept,
    Matrices,
    by_parameter,
    read_metadata,
    written_matrices,
)
from normuon_core.moving.settings import check_settings

_OWNER = {MATRIX: "matrices (momentum and polar factor)", ADAMW: "AdamW"}

_KEEPERS = {
    "remainder": (
        "A remainder is kept by with_bf16_remainder(...), or bf16_remainder=True in PyTorch"
    ),
    "gradient_sum": "A sum of gradients is kept by adam_every=k, with k above 1",
}
"""What keeps an array that not every optimizer has."""


class Wanted(NamedTuple):
    """What an optimizer keeps of one parameter.

    Attributes:
      kept: its settings and matrices.
      arrays: shape and dtype of each of its arrays, by the first part of the array's name.
    """

    kept: Kept
    arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]


def matching_state(
    arrays: Mapping[str, np.ndarray], wanted: Mapping[str, Wanted], changed: Collection[str]
) -> dict[str, Arrays]:
    """The state of each parameter, as the optimizer keeps it, with "step" beside it.

    Args:
      arrays: in the common format; parameters among them are left out.
      wanted: by the names of the parameters.
      changed: settings that may differ, see `check_settings`.

    Raises:
      ValueError: parameters that one side lacks, another optimizer, other settings, other matrices, or
        an array of another shape or dtype.
    """
    kept = read_metadata(arrays)
    own = {
        name: {kind: array for kind, array in each.items() if kind != "parameter"}
        for name, each in by_parameter(arrays).items()
    }
    own = {name: each for name, each in own.items() if each}
    _check_names(own, wanted, "the optimizer steps")
    for name, (target, shapes) in wanted.items():
        if name not in kept:
            raise ValueError(
                f"{name}: the metadata say nothing of it; arrays that were renamed by hand need a"
                " normuon_core.moving.NameTable, which renames the metadata too."
            )
        source = kept[name]
        _check_optimizer(name, source, target)
        check_settings(name, source.settings, target.settings, changed)
        _check_matrices(name, source.matrices, target.matrices)
        _check_arrays(name, own[name], {**shapes, "step": ((), np.dtype(np.int64))})
    return {name: own[name] for name in wanted}


def matching_parameters(
    arrays: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[tuple[int, ...], np.dtype]]
) -> Arrays:
    """The parameters, by name.

    Args:
      arrays: in the common format; state among them is left out.
      wanted: shape and dtype by name.

    Raises:
      ValueError: names that one side lacks, or an array of another shape or dtype.
    """
    own = {
        name: {"parameter": each["parameter"]}
        for name, each in by_parameter(arrays).items()
        if "parameter" in each
    }
    _check_names(own, wanted, "the model has")
    for name, shape_and_dtype in wanted.items():
        _check_arrays(name, own[name], {"parameter": shape_and_dtype})
    return {name: own[name]["parameter"] for name in wanted}


def _check_names(found: Collection[str], wanted: Collection[str], who: str) -> None:
    missing, superfluous = (
        [name for name in one if name not in other]
        for one, other in ((wanted, found), (found, wanted))
    )
    if not missing and not superfluous:
        return
    lines = [f"the file lacks {_listed(missing)}, which {who}"] if missing else []
    if superfluous:
        lines.append(f"the file has {_listed(superfluous)}, which are not among what {who}")
    near = difflib.get_close_matches(missing[0], superfluous, n=1, cutoff=0.8) if missing else []
    if near:
        lines.append(f"is {near[0]!r} meant by {missing[0]!r}?")
    raise ValueError(
        f"{'; '.join(lines)}. Names must be the same: rename the file's arrays and its metadata with a"
        " normuon_core.moving.NameTable (to_flax, to_torch), and hand over the model and the optimizer"
        " of that run."
    )


def _check_optimizer(name: str, source: Kept, target: Kept) -> None:
    found, wanted = source.settings["optimizer"], target.settings["optimizer"]
    if found != wanted:
        remedy = (
            "give it a layout (layout=, or a group of matrices in PyTorch)"
            if found == MATRIX
            else "send it to AdamW (layout None, or a group with optimizer='adamw' in PyTorch)"
        )
        raise ValueError(
            f"{name}: the file's run stepped it as {_OWNER[found]}, and here it goes to"
            f" {_OWNER[wanted]}; {remedy} to continue that run."
        )


def _check_matrices(name: str, found: Matrices, wanted: Matrices) -> None:
    if found and wanted and found != wanted:
        raise ValueError(
            f"{name}: the file's run took it for {written_matrices(found)}, and here it is"
            f" {written_matrices(wanted)}; give it a layout with those matrices (output_splits, or axes"
            " that are named on no side) to continue that run."
        )


def _check_arrays(
    name: str, found: Arrays, wanted: Mapping[str, tuple[tuple[int, ...], np.dtype]]
) -> None:
    if found.keys() != wanted.keys():
        hint = "".join(
            f" {keeper}: have it in both runs or in neither."
            for kind, keeper in _KEEPERS.items()
            if kind in found.keys() ^ wanted.keys()
        )
        raise ValueError(
            f"{name}: the file has {', '.join(sorted(found))}, and here {', '.join(sorted(wanted))} are"
            f" kept; make the optimizer with that run's settings.{hint}"
        )
    for kind, (shape, dtype) in wanted.items():
        array = found[kind]
        if array.shape != shape:
            raise ValueError(
                f"{kind}/{name}: the file has shape {array.shape}, and here it is {shape}; give its line"
                " of the NameTable the axes of both frameworks, as 'out in -> in out', or the optimizer"
                " the layout of that run."
            )
        if array.dtype != dtype:
            raise ValueError(
                f"{kind}/{name}: the file has {array.dtype}, and here it is {dtype};"
                f" {_dtype_remedy(kind, array.dtype)}."
            )


def _dtype_remedy(kind: str, dtype: np.dtype) -> str:
    if dtype == np.float64:
        return "run in float64 (jax.config.update('jax_enable_x64', True) and float64 parameters)"
    if kind == "momentum":
        return f"make the optimizer with momentum_dtype={dtype}"
    if kind == "exp_avg":
        return f"make the optimizer with adam_moment_dtype={dtype}"
    return "have the parameters in the dtype of that run"


def _listed(names: Collection[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:4])) + (f" and {len(names) - 4} more" if names[4:] else "")
