"""Hyperparameters in the state: `optax.inject_hyperparams` around the optimizers of this package.

Optax calls every callable argument as a schedule of the step count unless `static_args` names it. For
a layout or an orthogonalizer that is a silent mistake: it would be called with a number, and whatever
it returned would be taken for the setting.
"""

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from optax_normuon.leaves.others import check_others

STATIC_ARGS = (
    "recipe",
    "nesterov",
    "layout",
    "lr_mul",
    "wd_mul",
    "shape_scale",
    "coefficients",
    "steps",
    "eps",
    "orthogonalizer",
    "adam_nesterov",
    "adam_moment_dtype",
    "adam_cautious",
    "adam_every",
    "others",
    "momentum_dtype",
    "compute_dtype",
    "algorithm",
    "backend",
    "max_stack_bytes",
    "param_specs",
)
"""The arguments of `normuon` and `muon` that are no schedules: for `optax.inject_hyperparams(normuon,
static_args=STATIC_ARGS)`. `optax_normuon.inject_hyperparams` knows them by itself."""

_NO_HYPERPARAMETERS = (*STATIC_ARGS, "norm_scale", "rescale", "axis")
"""All such arguments, those included that only a stage's function has."""

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def inject_hyperparams(
    factory: Callable[..., optax.GradientTransformation],
    *,
    hyperparam_dtype: DTypeLike | None = jnp.float32,
) -> Callable[..., optax.GradientTransformationExtraArgs]:
    """`optax.inject_hyperparams` for an optimizer or a stage of this package.

    Numbers and schedules among the arguments become arrays of the state, to be read and set there:

        tx = optax_normuon.inject_hyperparams(muon)(0.02, adam_learning_rate=3e-3)
        state.hyperparams["learning_rate"] = jnp.float32(0.01)

    Args:
      factory: `normuon`, `muon`, `scale_by_normuon`, or a stage.
      hyperparam_dtype: of these arrays. Optax's own default, None, is the parameters' widest dtype:
        with bfloat16 parameters it rounds a beta2 of 0.95 to 0.9492.

    Returns:
      A function with the factory's arguments, all of which may be callables where the factory says so.
    """
    static = [name for name in inspect.signature(factory).parameters if name in _NO_HYPERPARAMETERS]
    return optax.inject_hyperparams(
        factory,
        static_args=static,
        hyperparam_dtype=None if hyperparam_dtype is None else jnp.dtype(hyperparam_dtype),
    )


def refuse_injection_of_static_arguments(
    factory: Callable[_Arguments, _Result],
) -> Callable[_Arguments, _Result]:
    """Makes `factory` say so where `optax.inject_hyperparams` takes its static arguments for schedules.

    Optax binds the arguments by the factory's signature, and calls those that are callable. So the
    signature hands out callables that refuse to be called with a step count; `factory` takes them for
    what they hold.
    """

    @functools.wraps(factory)
    def checked(*arguments: _Arguments.args, **keywords: _Arguments.kwargs) -> _Result:
        for name in _NO_HYPERPARAMETERS:
            value = keywords.get(name)
            if isinstance(value, _NoSchedule):
                keywords[name] = value.held
            # A multiplier is a number, too, and may be injected.
            elif isinstance(value, jax.Array) and name not in ("lr_mul", "wd_mul"):
                raise TypeError(_refusal(name))
        check_others(keywords.get("others"), keywords)
        return factory(*arguments, **keywords)

    signature = inspect.signature(factory)
    checked.__signature__ = _Signature(list(signature.parameters.values()))  # pyright: ignore
    return checked


class _Signature(inspect.Signature):
    """A signature that binds a callable static argument as one that refuses a step count."""

    def bind(self, *arguments: Any, **keywords: Any) -> inspect.BoundArguments:
        bound = super().bind(*arguments, **keywords)
        for name, value in bound.arguments.items():
            if (
                name in _NO_HYPERPARAMETERS
                and callable(value)
                and not isinstance(value, _NoSchedule)
            ):
                bound.arguments[name] = _NoSchedule(name, value)
        if bound.arguments.get("others") is None:
            return bound
        # Without AdamW its defaults are no hyperparameters.
        kept = [each for each in self.parameters.values() if not each.name.startswith("adam_")]
        check_others(bound.arguments["others"], bound.arguments)
        return inspect.BoundArguments(inspect.Signature(kept), OrderedDict(bound.arguments))


class _NoSchedule:
    """A callable argument that is no schedule."""

    def __init__(self, name: str, held: Any):
        self.name, self.held = name, held

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        raise TypeError(_refusal(self.name))


def _refusal(name: str) -> str:
    return (
        f"{name} is no schedule, but optax.inject_hyperparams takes it for a hyperparameter. Write"
        " optax_normuon.inject_hyperparams(...) instead, or give optax.inject_hyperparams(...,"
        " static_args=optax_normuon.STATIC_ARGS)."
    )
