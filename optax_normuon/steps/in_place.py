"""Parameters that a transformation steps itself, where only `optax.apply_updates` would follow.

An update that is handed out is written to memory and read again to be added. The kernels can add it
where they make it, which is allowed if nothing else wants the update. That is found out beforehand, by
a probe: the transformations that can step parameters hand out stand-ins, and the program that results
is searched for anything that reads one.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.core
import jax.extend
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_normuon.kernels.backend import has_kernels


@dataclass
class _Probe:
    """What is asked: which of these parameters' updates does nothing read?"""

    parameters: frozenset[int]


@dataclass
class _Permission:
    """Which parameters may be stepped, and which have been: by the arrays' identities."""

    parameters: frozenset[int]
    stepped: set[int] = field(default_factory=set)


_ASKED: ContextVar[_Probe | _Permission | None] = ContextVar("asked", default=None)

_stand_in_p = jax.extend.core.Primitive("normuon_stand_in")
"""It has no implementation: a program with stand-ins is looked at, never run."""


@_stand_in_p.def_abstract_eval
def _(parameter, *, dtype):
    return jax.core.ShapedArray(parameter.shape, dtype)


def stand_ins(
    params: optax.Params, dtype: Callable[[jax.Array], DTypeLike] = lambda leaf: leaf.dtype
) -> optax.Updates | None:
    """In a probe what stands for the updates of `params`; None outside of one.

    A transformation that may step its parameters starts with this, and hands it out with its state
    as it is. `dtype`: of a parameter's update.
    """
    asked = _ASKED.get()
    if not isinstance(asked, _Probe):
        return None

    def stand_in(leaf):
        if id(leaf) in asked.parameters:
            return _stand_in_p.bind(leaf, dtype=jnp.dtype(dtype(leaf)))
        return jnp.zeros(leaf.shape, dtype(leaf))

    return jax.tree.map(stand_in, params)


def may_step(parameter: jax.Array) -> bool:
    """Whether to hand out this parameter's new value in place of its update."""
    asked = _ASKED.get()
    return isinstance(asked, _Permission) and id(parameter) in asked.parameters


def has_stepped(parameter: jax.Array) -> None:
    """Notes that the new value of a parameter that `may_step` is what is handed out."""
    asked = _ASKED.get()
    assert isinstance(asked, _Permission)
    asked.stepped.add(id(parameter))


def update_in_place(
    tx: optax.GradientTransformation,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    *,
    wanted: Sequence[bool] | None = None,
    **extra_args: Any,
) -> tuple[list[tuple[jax.Array, jax.Array, bool]], optax.OptState]:
    """`tx.update`, which steps those parameters itself whose updates nothing reads.

    Args:
      wanted: of which leaves the new value would be of use; None stands for all.

    Returns:
      For each leaf of `params` (parameter, its update or its new value, whether it is that), and the
      state.
    """
    tx = optax.with_extra_args_support(tx)
    leaves, tree = jax.tree.flatten(params)
    permitted = []
    if has_kernels():
        unread = _unread(tx, grads, state, params, extra_args)
        asked = wanted or [True] * len(leaves)
        permitted = [leaf for leaf, *own in zip(leaves, asked, unread, strict=True) if all(own)]
    # An array that stands twice in the tree cannot be told from itself.
    permission = _Permission(frozenset(map(id, permitted)) - _repeated(leaves))
    with _asking(permission):
        updates, state = tx.update(grads, state, params, **extra_args)
    made = tree.flatten_up_to(updates)
    result = [
        (leaf, own, id(leaf) in permission.stepped) for leaf, own in zip(leaves, made, strict=True)
    ]
    return result, state


def _unread(
    tx: optax.GradientTransformationExtraArgs,
    grads: optax.Updates,
    state: optax.OptState,
    params: optax.Params,
    extra_args: dict[str, Any],
) -> list[bool]:
    """For each parameter whether its update is a stand-in that is handed out, and read by nothing."""
    leaves, tree = jax.tree.flatten(params)
    handed_out = []

    def probe(params, grads, state):
        with _asking(_Probe(frozenset(map(id, jax.tree.leaves(params))))):
            updates, state = tx.update(grads, state, params, **extra_args)
        made = tree.flatten_up_to(updates)
        handed_out[:] = [update is not None for update in made]
        # The state comes out as well: a transformation may keep an update in it.
        return made, state

    traced = jax.make_jaxpr(probe)(params, grads, state).jaxpr
    parameter_of = {
        equation.outvars[0]: equation.invars[0]
        for equation in traced.eqns
        if equation.primitive is _stand_in_p
    }
    reads: dict[Any, int] = {}
    for variables in (traced.outvars, *(equation.invars for equation in traced.eqns)):
        for variable in variables:
            if isinstance(variable, jax.extend.core.Var):
                reads[variable] = reads.get(variable, 0) + 1
    out_variables = iter(traced.outvars)
    result = []
    for own, has_update in zip(traced.invars[: len(leaves)], handed_out, strict=True):
        out = next(out_variables) if has_update else None
        result.append(parameter_of.get(out) is own and reads[out] == 1)
    return result


def _repeated(leaves: Sequence[Any]) -> set[int]:
    seen, again = set(), set()
    for leaf in leaves:
        (again if id(leaf) in seen else seen).add(id(leaf))
    return again


@contextlib.contextmanager
def _asking(asked: _Probe | _Permission) -> Iterator[None]:
    token = _ASKED.set(asked)
    try:
        yield
    finally:
        _ASKED.reset(token)
