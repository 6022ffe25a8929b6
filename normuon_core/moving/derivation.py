"""The table of two models whose modules have the same names: PyTorch's conventions against Flax's."""

import re
from collections.abc import Mapping, Sequence

from normuon_core.moving.name_table import NameTable
from normuon_core.moving.rule import Rule

_WEIGHTS = ("kernel", "scale", "embedding")
"""What Flax calls a module's `weight`."""

_KERNELS = {
    2: "out in -> in out",
    3: "out in width -> width in out",
    4: "out in height width -> height width in out",
    5: "out in depth height width -> depth height width in out",
}
"""By rank: linear layers, and convolutions."""

_PLAIN = {1: "size -> size", 2: "rows columns -> rows columns"}

Shapes = Mapping[str, Sequence[int]]


def derive_table(torch: Shapes, flax: Shapes) -> NameTable:
    """The table between two models whose modules have the same names.

    PyTorch's `weight` is Flax's `kernel` (linear layers and convolutions, whose axes are permuted),
    `scale` (norms) or `embedding`; `bias` is `bias`, and every other name is the same. Layers that are
    numbered in PyTorch may be one stack in Flax, with the layers as the first axis.

        derive_table(
            {name: param.shape for name, param in model.named_parameters()},
            optax_normuon.parameter_shapes(params),
        )

    Args:
      torch, flax: the shape of every parameter by name.

    Returns:
      A table that has one rule a parameter, or one a stack; printed, it is code to be changed.

    Raises:
      ValueError: parameters that have no counterpart, all of them, to be given rules by hand.
    """
    rules, used = [], set()
    unmatched = []
    for name, shape in flax.items():
        counterpart = _counterpart(name, torch)
        rule = None if counterpart is None else _rule(counterpart, name, torch, shape)
        if counterpart is None or rule is None:
            unmatched.append(f"{name} {tuple(shape)}")
            continue
        rules.append(rule)
        used |= {own for own in torch if rule.lines[0].ends[0].match(own) is not None}
    left = [f"{name} {tuple(shape)}" for name, shape in torch.items() if name not in used]
    if unmatched or left:
        raise ValueError(
            f"no counterpart was found in PyTorch for {', '.join(unmatched) or 'nothing'}, and in"
            f" Flax for {', '.join(left) or 'nothing'}; write their rules, as"
            " Rule('up.weight', 'up/kernel', 'out in -> in out'), and derive the table of the"
            " others without them. What is fused on one side alone takes a rule with cut."
        )
    return NameTable(rules)


def _counterpart(name: str, torch: Shapes) -> str | None:
    """The template of PyTorch's names for a parameter of Flax."""
    *module, last = name.split("/")
    parts = [*module, "weight" if last in _WEIGHTS else last]
    if ".".join(parts) in torch:
        return ".".join(parts)
    for own in torch:
        numbered = own.split(".")
        if [part for part in numbered if not part.isdecimal()] == parts:
            return ".".join("{layer}" if part.isdecimal() else part for part in numbered)
    return None


def _rule(template: str, name: str, torch: Shapes, shape: Sequence[int]) -> Rule | None:
    if template.count("{layer}") > 1:
        return None
    stacked = "{layer}" in template
    pattern = re.escape(template).replace(re.escape("{layer}"), r"\d+")
    members = [tuple(torch[own]) for own in torch if re.fullmatch(pattern, own)]
    axes = (_KERNELS if name.endswith("kernel") else _PLAIN).get(len(members[0]))
    if axes is None:
        return None
    left, right = (side.split() for side in axes.split(" -> "))
    sizes = dict(zip(left, members[0], strict=True))
    wanted = tuple(sizes[axis] for axis in right)
    if stacked:
        axes = f"{' '.join(left)} -> layer {' '.join(right)}"
        wanted = (len(members), *wanted)
    if wanted != tuple(shape) or len(set(members)) > 1:
        return None
    return Rule(template, name, None if left == right and not stacked else axes)
