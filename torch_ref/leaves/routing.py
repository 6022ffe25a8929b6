"""Which parameters of a model are matrices, and how: by the type of the module that owns them.

A module's type says how it stores its weight, so little is left to names: output heads, and the
parameters of modules that are not PyTorch's own. Where no evidence is left, `param_groups` asks.
"""

import fnmatch
import glob
import math
import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from normuon_core import MatrixLayout
from torch_ref.leaves.heads import output_heads

OUT_IN, IN_OUT = MatrixLayout(-1, -2), MatrixLayout(-2, -1)

Layouts = Mapping[str, MatrixLayout | None]

_TABLE = {
    *("emb", "embed", "embedding", "embeddings", "pos", "position", "positional", "wte", "wpe"),
    *("token", "tokens", "cls", "latents", "registers", "codebook", "queries", "prompt"),
}
_VECTOR = {
    *("bias", "biases", "scale", "gain", "gamma", "beta", "norm", "layerscale", "ls", "log"),
}


Reading = tuple[str, MatrixLayout | None]


class Route(NamedTuple):
    """How a parameter is trained.

    Attributes:
      layout: of its matrices; None for AdamW, and for a parameter in doubt.
      why: the reason, in words.
      readings: what a parameter in doubt may be, (meaning, layout or None), the likeliest first; empty
        where there is no doubt.
    """

    layout: MatrixLayout | None
    why: str
    readings: tuple[Reading, ...] = ()


class Owned(NamedTuple):
    """A parameter under its first name.

    Attributes:
      places: every (module's path, module, the parameter's name in it) that has it.
    """

    name: str
    param: torch.Tensor
    places: list[tuple[str, nn.Module, str]]


def owned_parameters(model: nn.Module) -> list[Owned]:
    """Every trained parameter once, in the order of `model.named_parameters()`.

    Raises:
      ValueError: a lazy parameter, whose shape is not known.
    """
    found: dict[torch.Tensor, Owned] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for own, param in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{own}" if path else own
            if not param.requires_grad:
                continue
            if is_lazy(param):
                raise ValueError(f"{name}: its shape is not known; run the model once before.")
            found.setdefault(param, Owned(name, param, [])).places.append((path, module, own))
    return list(found.values())


def route(model: nn.Module, layouts: Layouts | None = None) -> list[tuple[Owned, Route]]:
    """What becomes of every trained parameter of `model`.

    Args:
      layouts: by name pattern (`fnmatch`), for the parameters that the rules should not decide: a
        layout, or None for AdamW. The first pattern that fits counts.

    Raises:
      ValueError: a pattern that fits no parameter, or a layout that does not fit its shape.
    """
    layouts = layouts or {}
    parameters = owned_parameters(model)
    for pattern in layouts:
        if not any(fnmatch.fnmatchcase(each.name, pattern) for each in parameters):
            raise ValueError(
                f"layouts: the pattern {pattern!r} fits no parameter; the parameters are"
                f" {', '.join(each.name for each in parameters)}."
            )
    heads = output_heads(model)
    result = []
    for each in parameters:
        pattern = next((p for p in layouts if fnmatch.fnmatchcase(each.name, p)), None)
        if pattern is not None:
            found = Route(layouts[pattern], f"layout given for {pattern}")
        else:
            found = _route(model, each, heads)
        if found.layout is not None:
            found.layout.on(tuple(each.param.shape), each.name)
        result.append((each, found))
    return result


def _route(model: nn.Module, each: Owned, heads: Mapping[nn.Linear, str]) -> Route:
    shape = tuple(each.param.shape)
    if len(shape) < 2:
        return Route(None, "no matrix")
    if math.prod(shape) == 0:
        return Route(None, "no entries")
    others = ", ".join(path or "the model" for path, _, _ in each.places[1:])
    tied = f", tied to {others}" if others else ""
    if any(_is_embedding(module) for _, module, _ in each.places):
        return Route(None, f"embedding{tied}")
    path, module, own = _owner(model, *each.places[0])
    for other in (module, *(other for _, other, _ in each.places)):
        if isinstance(other, nn.Linear) and other in heads:
            return Route(None, f"output head: {heads[other]}{tied}")
    found = _route_module(path, module, own, shape)
    if found.layout is None:
        return found
    view = found.layout.on(shape)
    if min(view.inputs, *view.output_sizes) == 1:
        return Route(None, "a vector: one side is 1")
    return Route(found.layout, f"{found.why}{tied}")


def _owner(model: nn.Module, path: str, module: nn.Module, own: str) -> tuple[str, nn.Module, str]:
    """(path, module, name) of the weight that a parameter stands for where one is parametrized."""
    if isinstance(module, ParametrizationList):
        # `linear.parametrizations.weight` holds `original`, or `original0` (a magnitude) and the rest.
        path, _, name = path.rpartition(".parametrizations.")
        return path, model.get_submodule(path), f"{name}_g" if own == "original0" else name
    for old in ("_v", "_orig"):
        if own.removesuffix(old) != own and hasattr(module, own.removesuffix(old)):
            return path, module, own.removesuffix(old)
    return path, module, own


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) or "Embedding" in _kind(module)


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _route_module(path: str, module: nn.Module, own: str, shape: tuple[int, ...]) -> Route:
    is_weight = own == "weight"
    if own.endswith("_g") or "Norm" in _kind(module):
        return Route(None, "normalization")
    if isinstance(module, nn.MultiheadAttention):
        if own == "in_proj_weight":
            splits = (shape[0] // 3,) * 3
            return Route(MatrixLayout(-1, -2, splits), "attention's queries, keys and values")
        if own.endswith("_proj_weight"):
            return Route(OUT_IN, "attention's projection")
        return Route(None, "a stack of vectors")
    if isinstance(module, nn.RNNBase | nn.RNNCellBase) and own.startswith("weight"):
        return _route_recurrent(module, own, shape)
    if isinstance(module, nn.Bilinear) and is_weight:
        return Route(MatrixLayout((1, 2), 0), "bilinear layer, linear in the product of its inputs")
    if isinstance(module, nn.modules.conv._ConvNd) and is_weight:
        return _route_convolution(path, module, shape)
    if _kind(module) == "Conv1D" and is_weight and len(shape) == 2:
        # Hugging Face's: (in, out); `c_attn` is queries, keys and values side by side.
        inputs, outputs = shape
        if path.endswith("c_attn") and outputs > inputs and outputs % inputs == 0:
            splits = (inputs,) * (outputs // inputs)
            return Route(MatrixLayout(0, 1, splits), "attention's queries, keys and values")
        return Route(MatrixLayout(0, 1), "linear layer, stored (in, out)")
    if isinstance(module, nn.Linear) and is_weight:
        return Route(OUT_IN, "linear layer")
    return _route_unknown(path, module, own, shape)


def _route_recurrent(
    module: nn.RNNBase | nn.RNNCellBase, own: str, shape: tuple[int, ...]
) -> Route:
    """Gates lie along the outputs, each a matrix of its own; `weight_hr` projects the hidden state."""
    gates = 1 if own.startswith("weight_hr") else shape[0] // module.hidden_size
    if gates == 1:
        return Route(OUT_IN, "recurrent layer")
    return Route(MatrixLayout(-1, -2, (shape[0] // gates,) * gates), f"{gates} gates")


def _route_convolution(path: str, module: nn.modules.conv._ConvNd, shape: tuple[int, ...]) -> Route:
    """Which matrices a convolution's weight holds.

    A convolution multiplies patches (in, *kernel) by a matrix (out, in * kernel). A transposed one
    multiplies each position (in) by a matrix (out * kernel, in) and adds the patches up. In a grouped
    convolution each group is a matrix of its own, whose outputs are a block of all and read their own
    inputs alone. A matrix of one row or column is a vector.
    """
    *_, parent, own = ["", *path.split(".")]
    if {"patch"} & {*_words(parent), *_words(own)} and _TABLE & {*_words(parent), *_words(own)}:
        return Route(None, "patch embedding")
    groups, kernel = module.groups, tuple(range(2, len(shape)))
    kind = f"{len(kernel)}-D convolution"
    if groups > 1 and module.in_channels == groups:
        return Route(None, f"depthwise {kind}")
    if not module.transposed:
        layout = MatrixLayout((1, *kernel), 0)
        if groups == 1:
            return Route(layout, kind)
        splits = (shape[0] // groups,) * groups
        return Route(MatrixLayout((1, *kernel), 0, splits), f"{kind} in {groups} groups")
    layout = MatrixLayout(0, (1, *kernel))
    if groups == 1:
        return Route(layout, f"transposed {kind}")
    readings = (("left to AdamW", None), ("one matrix, its groups together", layout))
    return Route(None, f"transposed {kind} in {groups} groups", readings)


def _route_unknown(path: str, module: nn.Module, own: str, shape: tuple[int, ...]) -> Route:
    """A parameter of a module that is none of PyTorch's."""
    words = _words(own)
    if words and ({words[-1], *words[:1]} & _VECTOR or "bias" in words):
        return Route(None, f"a stack of vectors: {own}")
    if {*words} & _TABLE:
        return Route(None, "embedding")
    if len(shape) == 2:
        sides = (getattr(module, "out_features", None), getattr(module, "in_features", None))
        if sides == shape or ("Linear" in _kind(module) and own == "weight" and None in sides):
            return Route(OUT_IN, f"linear layer: {_kind(module)}")
        if sides == shape[::-1]:
            return Route(IN_OUT, f"linear layer: {_kind(module)}, stored (in, out)")
    return Route(None, f"a parameter of {_kind(module)}", _readings(shape))


def _readings(shape: tuple[int, ...]) -> tuple[Reading, ...]:
    *batch, rows, columns = shape
    many = f"{math.prod(batch)} matrices" if batch else "a matrix"
    stacks = (
        (f"{many} stored (out, in): {columns} in, {rows} out", OUT_IN),
        (f"{many} stored (in, out): {rows} in, {columns} out", IN_OUT),
    )
    no_matrix = ("no matrix, left to AdamW", None)
    if not batch:
        return (*stacks, no_matrix)
    axes = tuple(range(1, len(shape)))
    inputs = math.prod(shape[1:])
    convolution = f"a convolution: {inputs} in, {shape[0]} out"
    return (*stacks, (convolution, MatrixLayout(axes, 0)), no_matrix)


def question(routes: list[tuple[Owned, Route]]) -> str:
    """The readings of every parameter in doubt, and one dictionary that answers for all; "" if none."""
    lines, answers = [], []
    for each, found in routes:
        if not found.readings:
            continue
        lines.append(
            f"{each.name}: shape {tuple(each.param.shape)} can be read in {len(found.readings)} ways"
            f" ({found.why}):"
        )
        lines += [f"  {meaning}: {layout}" for meaning, layout in found.readings]
        meaning, layout = found.readings[0]
        written = f"torch_ref.{layout}" if layout else "None"
        answers.append(f"    {glob.escape(each.name)!r}: {written},  # {meaning}")
    if not lines:
        return ""
    return "\n".join([*lines, "Say which, for example with", "  layouts={", *answers, "  }"])
