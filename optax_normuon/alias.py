"""`normuon` by another name, with another recipe."""

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import optax

from normuon_core.recipes import Recipe
from optax_normuon.leaves.injection import refuse_injection_of_static_arguments
from optax_normuon.optimizer import normuon

_Function = TypeVar("_Function", bound=Callable)


def _with_keywords_of_normuon(function: _Function) -> _Function:
    """Shows `normuon`'s keywords, with the defaults that `function` has of its own.

    `optax.inject_hyperparams` passes on the defaults that it reads here.
    """
    own = inspect.signature(function).parameters
    signature = inspect.signature(normuon)
    parameters = [own.get(name, each) for name, each in signature.parameters.items()]
    function.__signature__ = signature.replace(parameters=parameters)  # pyright: ignore
    return function


@refuse_injection_of_static_arguments
@_with_keywords_of_normuon
def muon(
    learning_rate: optax.ScalarOrSchedule, *, recipe: str | Recipe = "muon", **keywords: Any
) -> optax.GradientTransformationExtraArgs:
    """Muon for the matrices of a model, AdamW for everything else: `normuon` with recipe "muon".

    Args:
      learning_rate: eta, a number or a schedule.
      recipe: "muon", or another without a second moment.
      **keywords: `normuon`'s.
    """
    return normuon(learning_rate, recipe=recipe, **keywords)
