"""State dicts whose tensors keep their dtypes.

`torch.optim.Optimizer.load_state_dict` casts every state to its parameter's dtype, which turns the
float32 momentum and the 16 remainder bits of a bfloat16 parameter into bfloat16.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from itertools import chain
from typing import TypeVar

import torch
from torch.optim.optimizer import StateDict

from torch_ref.leaves.dtensor import is_dtensor

ParameterState = Mapping[str, torch.Tensor]
"""What an optimizer keeps of one parameter, by name. An older file may have lists of tensors in it,
and numbers that count steps."""

Value = TypeVar("Value")


def restore_state(
    optimizer: torch.optim.Optimizer,
    saved: StateDict,
    shard: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    join: Callable[[torch.Tensor, ParameterState], ParameterState],
) -> None:
    """Puts the tensors of a loaded state dict back in the dtypes they were saved in.

    Args:
      optimizer: has just loaded `saved`.
      saved: a state dict; its tensors are copied, onto each parameter's device, the step counters
        too: a step that counts on the CPU could not be captured in a CUDA graph.
      shard: of (a parameter, a whole array of its state): the array as this rank keeps it.
      join: of (a parameter, its saved state): the state with second moments as they are kept now.
    """
    numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, param in zip(numbers, params, strict=True):
        if number not in saved["state"]:
            continue
        state = optimizer.state[param] = {}
        for key, value in join(param, saved["state"][number]).items():
            state[key] = _copied(value, param.device)
            if key != "step" and isinstance(value, torch.Tensor) and not is_dtensor(value):
                state[key] = shard(param, state[key])


def picklable(
    state: Mapping[torch.Tensor, ParameterState],
) -> dict[torch.Tensor, dict[str, torch.Tensor]]:
    """An optimizer's state with its uint16 tensors seen as int16: PyTorch cannot unpickle uint16.

    `torch.save` and `torch.load` can, so state dicts need no such help.
    """
    return {
        param: {key: _seen_as(value, torch.uint16, torch.int16) for key, value in own.items()}
        for param, own in state.items()
    }


def unpickled(
    state: Mapping[torch.Tensor, ParameterState],
) -> defaultdict[torch.Tensor, dict[str, torch.Tensor]]:
    """The inverse of `picklable`."""
    result: defaultdict[torch.Tensor, dict[str, torch.Tensor]] = defaultdict(dict)
    for param, own in state.items():
        result[param] = {
            key: _seen_as(value, torch.int16, torch.uint16) for key, value in own.items()
        }
    return result


def _seen_as(value: Value, old: torch.dtype, new: torch.dtype) -> Value | torch.Tensor:
    return value.view(new) if isinstance(value, torch.Tensor) and value.dtype == old else value


def _copied(value: Value, device: torch.device) -> Value | torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    return value
