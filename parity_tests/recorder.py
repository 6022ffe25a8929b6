"""Records what an optimizer does, as a trace that `python -m parity_tests identify TRACE` can read.

Around any PyTorch optimizer:

    recorder = Recorder(dict(model.named_parameters()))
    with in_float64():
        for batch in batches:
            loss(model, batch).backward()
            optimizer.step()
            recorder.add_torch(optimizer)
    recorder.save("run.npz")

Around any Optax transformation:

    recorder = Recorder(params)
    for grads in gradients:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        recorder.add(params, grads, lr=0.02, mu=0.95)
    recorder.save("run.npz")

Start at the optimizer's first step, where its momentum is zero, and record at least three steps; five or
six with a rate and a momentum that change tell more stages apart. Float64 decides what half precision
leaves open, so give the model float64 parameters. Six small matrices are enough, some tall, some wide.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from parity_tests.traces import safetensors_library


class Recorder:
    """Collects the weights of one run, with their gradients and rates.

    Args:
      params: arrays or tensors by name, of two axes or more; others are left out. They are copied.
      weights: metadata of single weights as `parity_tests/golden/README.md` has them, such as
        `{"qkv": {"split_sizes": [6, 2, 2]}}`.
    """

    def __init__(
        self, params: Mapping[str, Any], weights: Mapping[str, Mapping[str, Any]] | None = None
    ):
        self._params = {name: value for name, value in params.items() if np.ndim(value) >= 2}
        self._steps = 0
        self._arrays: dict[str, np.ndarray] = {}
        extra = weights or {}
        self._weights = {
            name: {"shape": list(np.shape(value)), **extra.get(name, {})}
            for name, value in self._params.items()
        }
        self._write("param", self._params)

    def add(self, params: Mapping[str, Any], grads: Mapping[str, Any], *, lr: float, mu: float):
        """One step: the parameters after it, its gradients, its learning rate and its momentum."""
        self._steps += 1
        self._write("param", params)
        self._write("grad", grads)
        self._arrays[f"lr/{self._steps}"] = np.array(float(lr))
        self._arrays[f"mu/{self._steps}"] = np.array(float(mu))

    def add_torch(
        self, optimizer: Any, *, grads: Mapping[str, Any] | None = None, mu: float | None = None
    ):
        """One step of a PyTorch optimizer, after it; rates are read from its first group.

        Args:
          grads: copies of the gradients, for an optimizer that overwrites `.grad`.
          mu: the momentum, where no option of that name has it.

        Raises:
          ValueError: the optimizer's options have no momentum.
        """
        group = optimizer.param_groups[0]
        if mu is None:
            mu = next((_first(group[name]) for name in _MOMENTA if name in group), None)
        if mu is None:
            raise ValueError(
                f"no momentum among {sorted(group)}; give it: add_torch(optimizer, mu=)."
            )
        if grads is None:
            grads = {name: param.grad for name, param in self._params.items()}
        self.add(self._params, grads, lr=float(group["lr"]), mu=mu)

    def save(self, path: str | Path) -> None:
        """Writes the trace: `.npz`, or `.safetensors` if that library is installed."""
        meta = json.dumps({"T": self._steps, "weights": self._weights})
        if Path(path).suffix == ".safetensors":
            arrays = {name: np.asarray(array) for name, array in self._arrays.items()}
            safetensors_library().numpy.save_file(arrays, path, metadata={"meta": meta})
        else:
            # NumPy's stubs take every keyword to be its flag.
            np.savez(path, meta=meta, **self._arrays)  # pyright: ignore[reportArgumentType]

    def _write(self, kind: str, values: Mapping[str, Any]) -> None:
        for name in self._weights:
            self._arrays[f"{kind}/{name}/{self._steps}"] = _copy(values[name])


_MOMENTA = ("momentum", "mu", "beta", "beta1", "momentum_beta", "betas")


def _first(value: Any) -> float:
    return float(value[0] if isinstance(value, tuple | list) else value)


def _copy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu().double().numpy()
    # safetensors takes every array to be row-major.
    return np.array(value, np.float64, order="C")


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """While it lasts, PyTorch's casts to narrower floats make a float64 copy.

    Optimizers orthogonalize in bfloat16, whose rounding hides a polynomial's last digits, eps and much
    more. The casts are `tensor.bfloat16()`, `.half()`, `.float()` and `.to(dtype)`; what an optimizer
    compiles stays what it is, so set TORCHDYNAMO_DISABLE=1 too.
    """
    import torch

    narrow = (torch.bfloat16, torch.float16, torch.float32)
    to: Any = torch.Tensor.to
    zeros_like = torch.zeros_like

    def lifted(value):
        return torch.float64 if value in narrow else value

    def to_float64(self, *args, **options):
        args = tuple(lifted(arg) if isinstance(arg, torch.dtype) else arg for arg in args)
        if "dtype" in options:
            options["dtype"] = lifted(options["dtype"])
        return to(self, *args, **options)

    def zeros_in_float64(*args, **options):
        if "dtype" in options:
            options["dtype"] = lifted(options["dtype"])
        return zeros_like(*args, **options)

    def copied(self, *args, **options):
        return to(self, torch.float64, copy=True)

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    patches = [
        mock.patch.object(torch.Tensor, name, copied) for name in ("bfloat16", "half", "float")
    ]
    patches += [
        mock.patch.object(torch.Tensor, "to", to_float64),
        mock.patch.object(torch, "zeros_like", zeros_in_float64),
    ]
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield
    finally:
        torch.set_default_dtype(default)
