"""Runs a golden trace's weight through `torch_ref.NorMuon`, in one dtype throughout."""

from dataclasses import dataclass

import numpy as np
import torch

from parity_tests.traces import Trace, Weight
from torch_ref import NorMuon


@dataclass(frozen=True)
class Run:
    """What a run leaves behind, in float64.

    Attributes:
      params: (T + 1, *shape), the first as given.
      momentum: (T, *shape), after each step.
      second_moment: by step from 1, in the weight's rank (blocks of a split joined flat); empty
        without neuron normalization.
    """

    params: np.ndarray
    momentum: np.ndarray
    second_moment: dict[int, np.ndarray]


def run_torch(
    weight: Weight, trace: Trace, *, dtype: torch.dtype = torch.float64, **keywords
) -> Run:
    """Every step of a trace on one of its weights.

    Args:
      weight, trace: what to run, see `parity_tests.traces`.
      dtype: of parameters, gradients and, unless `keywords` say otherwise, the computation.
      **keywords: for `NorMuon`.
    """
    param = torch.nn.Parameter(torch.tensor(weight.params[0], dtype=dtype))
    optimizer = NorMuon(
        [param],
        lr=0.0,
        recipe=weight.recipe,
        weight_decay=trace.weight_decay,
        layout=weight.layout,
        lr_mul=weight.lr_mul,
        wd_mul=weight.wd_mul,
        **{"compute_dtype": dtype, **keywords},
    )
    params, momentum, second_moment = [_array(param)], [], {}
    for index, gradient in enumerate(weight.grads):
        param.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.param_groups[0]["lr"] = float(trace.lr[index])
        optimizer.param_groups[0]["momentum"] = float(trace.mu[index])
        optimizer.step()
        state = optimizer.state[param]
        params.append(_array(param))
        momentum.append(_array(state["momentum"]))
        if "second_moment" in state:
            moments = state["second_moment"]
            split = isinstance(moments, list)
            second_moment[index + 1] = (
                np.concatenate([_array(block).ravel() for block in moments])
                if split
                else _array(moments)
            )
    return Run(np.stack(params), np.stack(momentum), second_moment)


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().double().numpy().copy()
