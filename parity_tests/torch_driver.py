"""The weights of a trace through `torch_ref.NorMuon`."""

import numpy as np
import torch

from parity_tests.traces import Trace
from parity_tests.trajectory import Trajectory, block_by_block
from torch_ref import NorMuon
from torch_ref.matrices.state import second_moments


def run_torch(
    trace: Trace, *, dtype: torch.dtype = torch.float64, compute_dtype: torch.dtype | None = None
) -> dict[str, Trajectory]:
    """Trains every weight of the trace on its gradients, learning rates and momenta, by name.

    Args:
      dtype: of parameters and gradients. compute_dtype: None is `dtype`.
    """
    params = [torch.nn.Parameter(torch.tensor(w.params[0], dtype=dtype)) for w in trace.weights]
    groups = [
        {
            "params": [param],
            "recipe": weight.recipe,
            "layout": weight.layout,
            "lr_mul": weight.lr_mul,
            "wd_mul": weight.wd_mul,
        }
        for param, weight in zip(params, trace.weights, strict=True)
    ]
    optimizer = NorMuon(
        groups, lr=0.0, weight_decay=trace.weight_decay, compute_dtype=compute_dtype or dtype
    )
    history = [[_array(param)] for param in params]
    moments: list[dict[int, np.ndarray]] = [{} for _ in params]
    for t, (lr, mu) in enumerate(zip(trace.lr, trace.mu, strict=True)):
        for group in optimizer.param_groups:
            group.update(lr=float(lr), momentum=float(mu))
        for param, weight in zip(params, trace.weights, strict=True):
            param.grad = torch.tensor(weight.grads[t], dtype=dtype)
        optimizer.step()
        for param, steps, moment, weight in zip(
            params, history, moments, trace.weights, strict=True
        ):
            steps.append(_array(param))
            if kept := [_array(each) for each in second_moments(optimizer.state[param])]:
                kept = kept[0] if len(kept) == 1 else kept
                moment[t + 1] = block_by_block(kept, weight.layout, tuple(param.shape))
    return {
        weight.name: Trajectory(np.stack(steps), _array(optimizer.state[param]["momentum"]), moment)
        for weight, param, steps, moment in zip(
            trace.weights, params, history, moments, strict=True
        )
    }


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().copy()
