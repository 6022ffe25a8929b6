"""A compiled kernel is called again only for arrays like those that it was compiled for."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no build for this platform")

from normuon_core.kernels.launches import Launch, Output
from torch_ref.kernels import launcher


class Kernel:
    """Stands for a kernel: counts how often Triton would look for a compiled one."""

    def __init__(self):
        self.looked_up, self.called = 0, 0

    def __getitem__(self, grid):
        return self._call_compiled if isinstance(grid, tuple) and len(grid) == 3 else self._look_up

    def _look_up(self, *arguments, **options):
        self.looked_up += 1
        return self

    def _call_compiled(self, *arguments):
        self.called += 1


def launched(*inputs):
    """How many of the launches with these inputs, one after the other, called a compiled kernel."""
    kernel = Kernel()
    launch = Launch(kernel, grid=1, constants={}, outputs=[Output((4,), "float32")])
    for each in inputs:
        (out,) = launcher.launch(launch, each)
        assert out.shape == (4,)
        assert out.dtype == torch.float32
    assert kernel.looked_up + kernel.called == len(inputs)
    return kernel.called


def test_the_same_arrays_call_the_compiled_kernel():
    x = torch.zeros(8)
    assert launched([x, (x, x), 1.0], [x, (x, x), 2.0], [x, (x, x), 3.0]) == 2


@pytest.mark.parametrize("place", ["alone", "in a tuple"])
def test_another_dtype_is_looked_up(place):
    x, other = torch.zeros(8), torch.zeros(8, dtype=torch.float16)
    changed = [other, (x,)] if place == "alone" else [x, (other,)]
    assert launched([x, (x,)], changed) == 0
    assert launched([x, (x,)], changed, changed, [x, (x,)]) == 2


@pytest.mark.parametrize("place", ["alone", "in a tuple"])
def test_arrays_that_are_not_aligned_are_looked_up_each_time(place):
    """Triton may have compiled loads of 16 bytes, which need arrays that begin at whole 16 bytes."""
    x, odd = torch.zeros(8), torch.zeros(9)[1:]
    changed = [odd, (x,)] if place == "alone" else [x, (odd,)]
    assert launched([x, (x,)], changed, changed) == 0
    assert launched(changed, [x, (x,)], [x, (x,)]) == 1
