"""The groups of a whole model, to be handed to `NorMuon`."""

import inspect
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from normuon_core import MatrixLayout
from normuon_core.table import leaf_table
from torch_ref.leaves.group_keys import ADAMW, Group, unknown_key
from torch_ref.leaves.routing import Layouts, Owned, Route, question, route
from torch_ref.optimizer import NorMuon

_MULTIPLIERS = {"lr_mul", "wd_mul"}
_SHARED = (*sorted(_MULTIPLIERS), "bf16_remainder")
_DECIDED = {"self", "params", "lr", "layout", "optimizer", "process_group"}


def param_groups(
    model: nn.Module,
    *,
    lr: float | torch.Tensor,
    adam_lr: float | torch.Tensor,
    layouts: Layouts | None = None,
    **keywords: Any,
) -> list[Group]:
    """The parameters of a model in groups: its matrices, each with its layout, and the rest for AdamW.

    The types of the modules decide: embeddings, the output head, norms, biases, depthwise convolutions
    and every parameter of fewer than two axes go to AdamW; convolutions are read as matrices, gates and
    fused projections of PyTorch's modules are matrices of their own. A parameter that is used twice is
    there once, with its embedding. Frozen parameters are left out. `describe` prints what comes out.

        optimizer = NorMuon(param_groups(model, lr=0.02, adam_lr=3e-4, weight_decay=0.1), lr=0.02)

    Args:
      model: its parameters may lie on any device, "meta" too.
      lr: of the matrices. adam_lr: of AdamW.
      layouts: by name pattern (`fnmatch`, `*` crosses dots), where the types should not decide: the
        layout of the parameters whose names fit, or None for AdamW. The first that fits counts.
      **keywords: options of `NorMuon`, put into the groups that they concern: those that start with
        `adam_` into AdamW's, `lr_mul`, `wd_mul` and `bf16_remainder` into all, others (`recipe`,
        `weight_decay`, ...) into those of matrices. `lr_mul` and `wd_mul` may be by name pattern too, as
        in `lr_mul={"*embed*": 0.3}`: the first that fits counts, and a parameter that fits none has 1.

    Returns:
      One group for each layout, then one for AdamW, each with `param_names`; none is empty. Parameters
      with multipliers of their own by pattern have groups of their own.

    Raises:
      ValueError: parameters that can be read in more than one way, all at once with a dictionary to
        paste; a pattern that fits nothing; an unknown keyword; a parameter whose shape is not known.
    """
    check_options(keywords)
    routes = route(model, layouts)
    if asked := question(routes):
        count = sum(bool(found.readings) for _, found in routes)
        raise ValueError(
            f"{count} of the model's parameters can be read in more than one way, and a guess would"
            f" train the wrong thing.\n\n{leaf_table(HEADER, rows_of(routes))}\n\n{asked}"
        )
    return grouped(routes, lr=lr, adam_lr=adam_lr, keywords=keywords)


HEADER = ("path", "shape", "optimizer", "why")


def rows_of(routes: list[tuple[Owned, Route]]) -> list[list[str]]:
    """One row a parameter, as in `HEADER`."""
    return [
        [each.name, printed_shape(each.param), optimizer_of(found, "matrices"), found.why]
        for each, found in routes
    ]


def printed_shape(param: torch.Tensor) -> str:
    """`4x3` for shape (4, 3)."""
    return "x".join(map(str, param.shape)) or "()"


def optimizer_of(found: Route, matrices: str) -> str:
    """The name of a parameter's optimizer, `matrices` for that of matrices; "?" for one in doubt."""
    if found.readings:
        return "?"
    return "AdamW" if found.layout is None else matrices


def grouped(
    routes: list[tuple[Owned, Route]],
    *,
    lr: float | torch.Tensor,
    adam_lr: float | torch.Tensor,
    keywords: dict[str, Any],
) -> list[Group]:
    """The groups, without the parameters in doubt."""
    of_all = {key: value for key, value in keywords.items() if key in _SHARED}
    of_adamw = {key: value for key, value in keywords.items() if key.startswith("adam_")}
    of_matrices = {key: keywords[key] for key in keywords if key not in of_adamw}
    names = [each.name for each, _ in routes]
    by_name = {key: _by_name(key, of_all[key], names) for key in _MULTIPLIERS & of_all.keys()}
    alike: dict[tuple[MatrixLayout | None, tuple], list[Owned]] = {}
    for each, found in routes:
        if not found.readings:
            patterns = tuple((key, of[each.name]) for key, of in sorted(by_name.items()))
            alike.setdefault((found.layout, patterns), []).append(each)
    matrices, others = [], []
    for (layout, patterns), members in alike.items():
        own = {
            key: 1.0 if pattern is None else of_all[key][pattern]
            for key, pattern in patterns
            if isinstance(of_all[key], Mapping)
        }
        if layout is None:
            adamw = {"optimizer": ADAMW, "lr": adam_lr, **of_all, **of_adamw, **own}
            others.append({**_named(members), **adamw})
        else:
            matrices.append({**_named(members), "lr": lr, "layout": layout, **of_matrices, **own})
    return matrices + others


def _by_name(key: str, factors: Any, names: list[str]) -> dict[str, str | None]:
    """For each parameter's name the first pattern that it fits, where `factors` are by pattern.

    Raises:
      ValueError: a pattern that fits no name.
    """
    patterns = list(factors) if isinstance(factors, Mapping) else []
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"param_groups: the pattern {pattern!r} of {key} meets no parameter; they are"
                f" {', '.join(names)}."
            )
    return {
        name: next((each for each in patterns if fnmatchcase(name, each)), None) for name in names
    }


def _named(members: list[Owned]) -> Group:
    return {
        "params": [each.param for each in members],
        "param_names": [each.name for each in members],
    }


def check_options(keywords: dict[str, Any]) -> None:
    """Raises a ValueError for a keyword that is none of `NorMuon`'s or that the groups decide."""
    known = {*inspect.signature(NorMuon.__init__).parameters} - _DECIDED
    for key in keywords:
        if key not in known:
            raise ValueError(unknown_key(key, known, "param_groups"))
