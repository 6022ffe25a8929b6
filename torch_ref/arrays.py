"""Tensors as NumPy arrays and back, in their own dtypes, whole where ranks hold parts of them."""

from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import torch

from torch_ref.leaves.dtensor import is_dtensor
from torch_ref.leaves.dtypes import dtype_name

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NUMPY = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16)}


def numpy_dtype(dtype: torch.dtype) -> np.dtype:
    """The dtype of the same name, bfloat16 included."""
    return _NUMPY.get(dtype) or np.dtype(dtype_name(dtype))


def as_array(tensor: torch.Tensor, group: "ProcessGroup | None" = None) -> np.ndarray:
    """A copy of a tensor in its own dtype.

    Args:
      tensor: on any device. All ranks of a DTensor's mesh must call, and each gets the whole.
      group: in place of the mesh all of these ranks call.
    """
    tensor = tensor.detach()
    if is_dtensor(tensor):
        from torch_ref.mesh.gathering import gathered

        tensor = gathered(tensor, group)
    dtype = numpy_dtype(tensor.dtype)
    # NumPy takes no bfloat16 from PyTorch.
    bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return bits.cpu().contiguous().numpy().view(dtype).copy()


def as_tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A tensor on `device` with a copy of the array, in the array's dtype."""
    array = np.array(array)
    for dtype, own in _NUMPY.items():
        if array.dtype == own:
            return torch.from_numpy(array.view(np.int16)).view(dtype).to(device)
    return torch.from_numpy(array).to(device)
