"""Telling a DTensor from a tensor, and seeing what this process holds of one."""

import sys
from typing import Any, TypeGuard


def is_dtensor(value: object) -> TypeGuard[Any]:
    """Whether `value` is a `torch.distributed.tensor.DTensor`.

    The class is not imported for that: where nobody has, there is no DTensor, and its import takes
    longer than the rest of this package.
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local(value: Any) -> Any:
    """The shard of a DTensor that this process holds, sharing its memory; others are left alone."""
    return value.to_local() if is_dtensor(value) else value


def local_state(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as this process holds it."""
    return {key: local(value) for key, value in state.items()}
