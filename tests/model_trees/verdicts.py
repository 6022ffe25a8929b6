"""What the routing makes of a recorded model's leaves, beside what they are."""

from typing import NamedTuple

import numpy as np

from optax_normuon.leaves.paths import named_leaves
from optax_normuon.leaves.route import Route
from optax_normuon.leaves.routing import route

from .fixtures import Fixture
from .roles import Role


class Verdict(NamedTuple):
    """One leaf's outcome: "right", "asked" or "wrong"."""

    name: str
    shape: tuple[int, ...]
    outcome: str
    role: Role
    routed: str


def judge(fixture: Fixture) -> list[Verdict]:
    """One verdict a leaf, in the leaves' order."""
    verdicts = []
    routes = route(fixture.params)
    for (path, name, leaf), role in zip(named_leaves(fixture.params), fixture.roles, strict=True):
        shape, found = np.shape(leaf), routes[path]
        if found.in_doubt:
            verdicts.append(Verdict(name, shape, "asked", role, f"?: {found.why}"))
            continue
        outcome = "right" if _agrees(found, role, shape) else "wrong"
        verdicts.append(Verdict(name, shape, outcome, role, f"{found.layout}: {found.why}"))
    return verdicts


def _agrees(route: Route, role: Role, shape) -> bool:
    """Axes merged in another order are the same matrix but for the order of its rows or columns."""
    if route.layout is None or role.adamw is not None:
        return route.layout is None and role.adamw is not None
    if route.layout.output_splits is not None:
        return False
    sides = (route.layout.reduction_axis, route.layout.output_axis)
    reduction, output = (
        sorted(axis % len(shape) for axis in ((side,) if isinstance(side, int) else side))
        for side in sides
    )
    return (reduction, output) == (sorted(role.reduction_axis), sorted(role.output_axis))
