"""Which leaves are matrices, by path and shape, and which go to AdamW.

The rules know Flax's names and the common ones beside them. Evidence is used in this order: what the
path says, what a bias beside the kernel says by its shape, how attention kernels fit each other.
Where two readings are left, `route` raises and prints both: a guess would train the wrong thing.
"""

import fnmatch
import glob
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from optax.contrib import MuonDimensionNumbers

from normuon_core.layout import MatrixLayout
from optax_normuon.paths import KeyPath, named_leaves, unmet_pattern

LeafLayout = MatrixLayout | MuonDimensionNumbers | None

_EMBEDDING = {
    *("emb", "embed", "embedding", "embeddings", "embedder", "wte", "wpe", "vocab"),
    *("unembed", "unembedding"),
}
_TABLE = {"pos", "position", "positional", "posembed", "token", "tokens", "cls"}
_HEAD = {"head", "classifier", "readout"}
_NORM = {
    *("norm", "layernorm", "rmsnorm", "batchnorm", "groupnorm", "instancenorm", "ln", "bn"),
}
_VECTOR = {"bias", "scale", "gamma", "beta"}
_LINEAR = {
    *("dense", "linear", "mlp", "ffn", "fc", "up", "down", "gate", "expert", "experts", "moe"),
}
_CONV = {"conv", "convolution"}
_ATTENTION_IN, _ATTENTION_OUT = {"query", "key", "value", "q", "k", "v"}, {"out", "o"}
_STACKED = {"scan", "stack", "stacked", "vmap"}


class Reading(NamedTuple):
    """One way to read a leaf. `bias_shape`: the bias that such a layer would have beside it."""

    meaning: str
    layout: MatrixLayout
    bias_shape: tuple[int, ...]
    is_convolution: bool = False


class Route(NamedTuple):
    """What becomes of a leaf: a layout, or None for AdamW, and why."""

    layout: MatrixLayout | None
    why: str


NO_ENTRIES = Route(None, "no entries")


def _words(part: str) -> list[str]:
    """`MultiHeadAttention_0` -> multi, head, attention; `ln1` -> ln; `lm_head` -> lm, head."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", part)]


def _linear(shape) -> Reading:
    *batch, inputs, outputs = shape
    kind = f"{math.prod(batch)} linear layers" if batch else "a linear layer"
    return Reading(f"{kind}, {inputs} in, {outputs} out", MatrixLayout(-2, -1), (*batch, outputs))


def _inputs_merged(shape, axes: int, kind: str) -> Reading:
    """The last axis out, the `axes` before it in: convolutions, attention outputs."""
    batch = shape[: -axes - 1]
    inputs = math.prod(shape[-axes - 1 : -1])
    return Reading(
        f"{_counted(batch, kind)}, {inputs} in, {shape[-1]} out",
        MatrixLayout(tuple(range(-axes - 1, -1)), -1),
        (*batch, shape[-1]),
        is_convolution="convolution" in kind,
    )


def _outputs_merged(shape, kind: str) -> Reading:
    """The last two axes out: attention queries, keys and values."""
    *batch, inputs, heads, size = shape
    return Reading(
        f"{_counted(batch, kind)}, {inputs} in, {heads}x{size} out",
        MatrixLayout(-3, (-2, -1)),
        (*batch, heads, size),
    )


def _counted(batch, kind: str) -> str:
    return f"{math.prod(batch)} {kind}s" if batch else f"{'an' if kind[0] == 'a' else 'a'} {kind}"


def _convolutions(shape) -> list[Reading]:
    """Plain convolution first, then stacks of convolutions of lower rank."""
    return [
        _inputs_merged(shape, axes, f"{axes - 1}-D convolution")
        for axes in range(len(shape) - 1, 1, -1)
    ]


def _all_readings(shape) -> list[Reading]:
    readings = [_linear(shape), *_convolutions(shape)]
    if len(shape) >= 3:
        readings.append(_outputs_merged(shape, "attention or DenseGeneral kernel"))
    return readings


class _Tree:
    """Shapes by name, for looking beside a leaf."""

    def __init__(self, params):
        self.shapes = {name: tuple(np.shape(leaf)) for _, name, leaf in named_leaves(params)}

    def beside(self, name: str, *path: str) -> tuple[int, ...] | None:
        """The shape at `path` relative to the leaf's parent, `..` meaning one level up."""
        parts = name.split("/")[:-1]
        for step in path:
            parts = parts[:-1] if step == ".." else [*parts, step]
        return self.shapes.get("/".join(parts))


def _route_leaf(name: str, tree: _Tree) -> Route:
    shape = tree.shapes[name]
    parts = name.split("/")
    leaf = _words(parts[-1])
    parent = _words(parts[-2]) if len(parts) > 1 else []
    path_words = {word for part in parts for word in _words(part)}
    if len(shape) < 2:
        return Route(None, "no matrix")
    if math.prod(shape) == 0:
        return NO_ENTRIES
    if path_words & _EMBEDDING or set(leaf) & _TABLE:
        return Route(None, "embedding")
    if "logits" in path_words or (set(leaf[-1:]) | set(parent[-1:])) & _HEAD:
        return Route(None, "output head")
    if set(leaf[-1:]) & _VECTOR or parts[-1] == "b":
        return Route(None, f"a stack of vectors: {parts[-1]}")
    if set(leaf[-1:]) & _NORM or (set(parent) & _NORM and "kernel" not in leaf):
        return Route(None, "normalization")
    if parts[-1] == "weight":
        readings = _weight_readings(shape, parent)
    else:
        readings = _kernel_readings(name, shape, parent, path_words, tree)
    if len(readings) != 1:
        raise ValueError(_ambiguous(name, shape, readings))
    (reading,) = readings
    if reading.is_convolution and shape[-2] == 1:
        return Route(None, "convolution with one input channel a group")
    return _matrix_unless_vector(shape, reading.layout, reading.meaning)


def _weight_readings(shape, parent: list[str]) -> list[Reading]:
    """`weight` is stored (out, in), as in Equinox and PyTorch."""
    *batch, outputs, inputs = shape
    kind = f"{math.prod(batch)} linear weights" if batch else "a linear weight"
    stack = Reading(f"{kind}, {inputs} in, {outputs} out", MatrixLayout(-1, -2), (*batch, outputs))
    if not batch:
        return [stack]
    outputs, *rest = shape
    convolution = Reading(
        f"a {len(shape) - 2}-D convolution weight, {math.prod(rest)} in, {outputs} out",
        MatrixLayout(tuple(range(1, len(shape))), 0),
        (outputs,),
    )
    if set(parent) & _CONV:
        return [convolution]
    return [stack] if set(parent) & _LINEAR else [stack, convolution]


def _kernel_readings(name, shape, parent: list[str], path_words, tree: _Tree) -> list[Reading]:
    """What the name suggests if the bias beside the kernel allows it, else whatever the bias does."""
    if len(shape) == 2:
        return [_linear(shape)]
    bias = tree.beside(name, "bias")
    suggested = _suggested_readings(name, shape, parent, path_words, tree)
    if bias is None:
        return suggested
    for readings in (suggested, _all_readings(shape)):
        fitting = [reading for reading in readings if reading.bias_shape == bias]
        if fitting:
            return fitting
    return _all_readings(shape)


def _suggested_readings(name, shape, parent, path_words, tree) -> list[Reading]:
    role = set(parent) - {"proj"}
    if role & _CONV:
        readings = _convolutions(shape)
        stacked = path_words & _STACKED or tree.beside(name, "bias") is not None
        return readings if stacked else readings[:1]
    if role and role <= _ATTENTION_IN:
        heads = _outputs_merged(shape, "attention kernel")
        return _fitting_attention(name, tree, [heads, _linear(shape)])
    if role and role <= _ATTENTION_OUT and _query_beside(name, tree) is not None:
        heads = _inputs_merged(shape, 2, "attention output kernel")
        return _fitting_attention(name, tree, [heads, _linear(shape)])
    if set(parent) & _LINEAR and "general" not in parent:
        return [_linear(shape)]
    return _all_readings(shape)


def _matrix_unless_vector(shape, layout: MatrixLayout, why: str) -> Route:
    _, rows, columns = layout.on(shape).stack_shape
    if min(rows, columns) == 1:
        return Route(None, "a vector: one side is 1")
    return Route(layout, why)


def _query_beside(name: str, tree: _Tree) -> tuple[int, ...] | None:
    leaf = name.split("/")[-1]
    names = ("query", "q", "q_proj")
    shapes = (tree.beside(name, "..", query, leaf) for query in names)
    return next((shape for shape in shapes if shape is not None), None)


def _fitting_attention(name: str, tree: _Tree, readings: list[Reading]) -> list[Reading]:
    """With heads as axes, out is (*batch, heads, head_dim, d) where query is (*batch, d, heads,
    head_dim); a stack of plain linear layers has query (*batch, d, k) and out (*batch, k, d)."""
    query = _query_beside(name, tree)
    leaf = name.split("/")[-1]
    outs = (tree.beside(name, "..", out, leaf) for out in ("out", "o", "o_proj", "out_proj"))
    out = next((shape for shape in outs if shape is not None), None)
    if query is None or out is None or len(query) != len(out):
        return readings
    heads = query[-2:] == out[-3:-1]
    plain = query[:-2] == out[:-2] and query[-1] == out[-2]
    if heads == plain:
        return readings
    return readings[:1] if heads else readings[1:]


def _ambiguous(name: str, shape, readings: list[Reading]) -> str:
    lines = [f"{name}: shape {shape} can be read in {len(readings)} ways:"]
    lines += [f"  {reading.meaning}: {reading.layout}" for reading in readings]
    lines += [
        "Say which, for example with",
        f"  layout=optax_normuon.layout_by_path({{{glob.escape(name)!r}:"
        f" optax_normuon.{readings[0].layout}}})",
        "or give None in the layout's place to leave the leaf to AdamW.",
    ]
    return "\n".join(lines)


def route(params, overrides: Mapping[str, LeafLayout] | None = None) -> dict[KeyPath, Route]:
    """What becomes of every leaf.

    Args:
      params: arrays or abstract arrays.
      overrides: layouts by path pattern (`fnmatch`), for the leaves that the rules should not decide.

    Raises:
      ValueError: a leaf that can be read in two ways, or a pattern that meets no leaf.
    """
    overrides = overrides or {}
    tree = _Tree(params)
    unmet = unmet_pattern(overrides, params)
    if unmet is not None:
        raise ValueError(
            f"layout_by_path: the pattern {unmet!r} meets no leaf; the leaves are"
            f" {', '.join(tree.shapes)}."
        )
    routes = {}
    for path, name, _ in named_leaves(params):
        pattern = next((p for p in overrides if fnmatch.fnmatchcase(name, p)), None)
        if pattern is None:
            routes[path] = _route_leaf(name, tree)
        else:
            chosen = overrides[pattern]
            layout = None if chosen is None else as_matrix_layout(name, chosen)
            routes[path] = Route(layout, f"layout given for {pattern}")
    return routes


@dataclass(frozen=True)
class LayoutByPath:
    """What `layout_by_path` returns: routing by path and shape, with overrides."""

    overrides: Mapping[str, LeafLayout]

    def __call__(self, params) -> Any:
        """The tree of layouts, for composing layouts of one's own."""
        routes = route(params, self.overrides)
        return jax.tree_util.tree_map_with_path(lambda path, _: routes[path].layout, params)


def layout_by_path(overrides: Mapping[str, LeafLayout]) -> LayoutByPath:
    """A layout that routes by path and shape except where a pattern says otherwise.

    Args:
      overrides: from path patterns (`fnmatch` style, `*` crosses `/`) to a `MatrixLayout`, an
        `optax.contrib.MuonDimensionNumbers`, or None for AdamW. The first pattern that fits counts.

    Returns:
      A callable for the `layout` argument.

    Example: `normuon(0.02, layout=layout_by_path({"*/conv/kernel": None}))`.
    """
    return LayoutByPath(dict(overrides))


def as_matrix_layout(name: str, layout) -> MatrixLayout:
    """A leaf's layout as a `MatrixLayout`; `name` is what an error calls the leaf."""
    if isinstance(layout, MatrixLayout):
        return layout
    if isinstance(layout, MuonDimensionNumbers):
        reduction, output = (
            axes if isinstance(axes, int) else tuple(axes)
            for axes in (layout.reduction_axis, layout.output_axis)
        )
        return MatrixLayout(reduction, output)
    raise ValueError(
        f"{name}: a layout must be a MatrixLayout, an optax.contrib.MuonDimensionNumbers or None"
        f" (AdamW), got {layout!r}."
    )
