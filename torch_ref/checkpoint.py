"""State dicts that keep what PyTorch would cast away.

`torch.optim.Optimizer.load_state_dict` casts every state to its parameter's dtype, which turns the
float32 momentum and the 16 remainder bits of a bfloat16 parameter into bfloat16.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from itertools import chain
from typing import Any

import torch

from torch_ref.local import is_dtensor


def restore_state(
    optimizer: torch.optim.Optimizer,
    saved: dict[str, Any],
    shard: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    join: Callable[[torch.Tensor, list[torch.Tensor]], Any],
) -> None:
    """Puts the tensors of a loaded state dict back in the dtypes they were saved in.

    Args:
      optimizer: has just loaded `saved`.
      saved: a state dict; its tensors are copied, onto each parameter's device, the step counters
        onto the CPU.
      shard: of (a parameter, a whole array of its state): the array as this rank keeps it.
      join: of (a parameter, its second moments block by block): as they are kept now.
    """
    numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, param in zip(numbers, params, strict=True):
        for key, value in saved["state"].get(number, {}).items():
            device = torch.device("cpu") if key == "step" else param.device
            value = _copied(value, device)
            if isinstance(value, list) and not any(map(is_dtensor, value)):
                value = join(param, value)
            if key != "step":
                value = _sharded(value, partial(shard, param))
            optimizer.state[param][key] = value


def _sharded(value: Any, shard: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_sharded(each, shard) for each in value]
    return value if is_dtensor(value) else shard(value)


def picklable(state: Mapping[torch.Tensor, dict[str, Any]]) -> dict[torch.Tensor, dict[str, Any]]:
    """An optimizer's state with its uint16 tensors seen as int16: PyTorch cannot unpickle uint16.

    `torch.save` and `torch.load` can, so state dicts need no such help.
    """
    return {
        param: {key: _seen_as(value, torch.uint16, torch.int16) for key, value in own.items()}
        for param, own in state.items()
    }


def unpickled(
    state: Mapping[torch.Tensor, dict[str, Any]],
) -> defaultdict[torch.Tensor, dict[str, Any]]:
    """The inverse of `picklable`."""
    result: defaultdict[torch.Tensor, dict[str, Any]] = defaultdict(dict)
    for param, own in state.items():
        result[param] = {
            key: _seen_as(value, torch.int16, torch.uint16) for key, value in own.items()
        }
    return result


def _seen_as(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    return value.view(new) if isinstance(value, torch.Tensor) and value.dtype == old else value


def _copied(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, list | tuple):
        return [_copied(item, device) for item in value]
    return value
