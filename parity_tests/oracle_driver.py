"""The weights of a trace through the oracle."""

import numpy as np

from parity_tests import oracle
from parity_tests.traces import Trace, Weight
from parity_tests.trajectory import Trajectory


def run_oracle(trace: Trace) -> dict[str, Trajectory]:
    """Every weight's trajectory in float64, by name."""
    return {weight.name: _run(weight, trace) for weight in trace.weights}


def _run(weight: Weight, trace: Trace) -> Trajectory:
    state = oracle.WeightState()
    params, second_moment = [weight.params[0]], {}
    for t, gradient in enumerate(weight.grads):
        params.append(
            oracle.step_weight(
                weight.recipe,
                weight.layout,
                params[-1],
                gradient,
                state,
                lr=trace.lr[t],
                mu=trace.mu[t],
                weight_decay=trace.weight_decay,
                lr_mul=weight.lr_mul,
                wd_mul=weight.wd_mul,
            )
        )
        if weight.recipe.neuron_norm is not None:
            second_moment[t + 1] = _second_moment_in_order(state)
    return Trajectory(np.stack(params), _momentum_as_weight(weight, state), second_moment)


def _second_moment_in_order(state: oracle.WeightState) -> np.ndarray:
    """The second moments of a weight, flat: block by block, and matrix by matrix within a block."""
    keys = sorted(state.matrices, key=lambda key: (key[1], key[0]))
    return np.concatenate([np.ravel(state.matrices[key].second_moment) for key in keys])


def _momentum_as_weight(weight: Weight, state: oracle.WeightState) -> np.ndarray:
    """Every trace's layout has (rows, columns) last; an (in, out) one is stored transposed."""
    stored_in_out = weight.layout.output_axis in (1, -1)
    shape = weight.params.shape[1:]
    out_in = np.empty(shape[:-2] + (shape[:-3:-1] if stored_in_out else shape[-2:]))
    for (index, first), matrix in state.matrices.items():
        block = slice(first, first + np.shape(matrix.momentum)[0])
        out_in[(*index, block)] = matrix.momentum
    return out_in.swapaxes(-1, -2) if stored_in_out else out_in
