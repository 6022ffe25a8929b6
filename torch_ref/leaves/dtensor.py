"""Telling a DTensor from a tensor, and seeing what this process holds of one."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeGuard

import torch

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(value: object) -> "TypeGuard[DTensor]":
    """Whether `value` is a `torch.distributed.tensor.DTensor`.

    The class is looked up among the modules that are imported already: without its module there is no
    DTensor, and importing it takes longer than importing the rest of this package.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(value: torch.Tensor) -> torch.Tensor:
    """The shard of a DTensor that this process holds, sharing its memory; another tensor as it is."""
    return value.to_local() if is_dtensor(value) else value


def local_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A parameter's state as this process holds it."""
    return {key: local(value) for key, value in state.items()}
