"""Which arguments may stand beside `others`, the transformation that takes AdamW's place."""

from collections.abc import Container, Iterable

import numpy as np
import optax

from optax_normuon.leaves.multipliers import Multipliers
from optax_normuon.leaves.paths import KeyPath, named_leaves


def check_others(others: object, given: Iterable[str]) -> None:
    """Refuses an `others` that is no transformation, and AdamW's keywords beside it.

    Args:
      given: the names of all arguments that the caller gave.

    Raises:
      TypeError: `others` is no `optax.GradientTransformation`.
      ValueError: a keyword of AdamW's is given.
    """
    if others is None:
        return
    if not isinstance(others, optax.GradientTransformation):
        raise TypeError(
            f"others={others!r} is no optax.GradientTransformation; give one, such as"
            " optax.lion(1e-4), or None for AdamW."
        )
    unused = [name for name in given if name.startswith("adam_")]
    if unused:
        raise ValueError(
            f"{', '.join(unused)} would do nothing: `others` takes AdamW's place. Say these in"
            " `others`, as in others=optax.adamw(3e-3, b2=0.95), or leave `others` out."
        )


def check_no_multipliers(
    params: optax.Params, matrices: Container[KeyPath], factors: Multipliers, what: str
) -> None:
    """Refuses factors on leaves that `others` trains: nothing would apply them.

    Args:
      matrices: the key paths of the leaves that are matrices.

    Raises:
      ValueError: it names the leaf.
    """
    for path, name, _ in named_leaves(params):
        factor = factors.on(path)
        if path not in matrices and not (
            isinstance(factor, int | float | np.generic) and factor == 1
        ):
            raise ValueError(
                f"{name}: {what}={factor} would do nothing, for `others` trains this leaf; leave it out"
                f" of {what}, and scale inside `others` with optax.partition or optax.masked."
            )
