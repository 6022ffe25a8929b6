"""Tensors as NumPy arrays and back, in their own dtypes, whole where ranks hold parts of them."""

import ml_dtypes
import numpy as np
import torch

from torch_ref.leaves.dtensor import is_dtensor
from torch_ref.leaves.dtypes import dtype_name

_BITS = {torch.bfloat16: torch.int16, torch.uint16: torch.int16}
"""Dtypes that NumPy or a collective does not take, seen as one of the same size that both take."""

_NUMPY = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The dtype of the same name, bfloat16 included."""
    return _NUMPY.get(dtype) or np.dtype(dtype_name(dtype))


def as_array(tensor: torch.Tensor) -> np.ndarray:
    """A copy of a tensor in its own dtype.

    Args:
      tensor: on any device. All ranks of a DTensor's mesh must call, and each gets the whole.
    """
    dtype = tensor.dtype
    tensor = tensor.detach()
    if is_dtensor(tensor):
        tensor = _gathered(tensor)
    bits = tensor.view(_BITS[dtype]) if dtype in _BITS else tensor
    return bits.cpu().contiguous().numpy().view(numpy_dtype(dtype)).copy()


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(tensor, DTensor)
    if tensor.dtype not in _BITS:
        return tensor.full_tensor()
    bits = DTensor.from_local(
        tensor.to_local().view(_BITS[tensor.dtype]),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
    return bits.full_tensor().view(tensor.dtype)


def as_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor on `device` with a copy of the array, in the array's dtype."""
    array = np.array(array)
    for dtype, own in _NUMPY.items():
        if array.dtype == own:
            return torch.from_numpy(array.view(np.int16)).view(dtype).to(device)
    return torch.from_numpy(array).to(device)
