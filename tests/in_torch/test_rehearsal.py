"""Kernels are compiled side by side before the first step: exactly those that the step launches."""

import pytest
import torch

from torch_ref import MatrixLayout, NorMuon
from torch_ref.steps import fused

KERNELS = ["squares", "feed", "product", "neuron_squares", "statistics", "finish"]


class Recorder:
    """Stands for a kernel: notes for what it is compiled and launched, and does nothing."""

    def __init__(self, name):
        self.name, self.compiled, self.launched, self.devices = name, [], [], set()

    def warmup(self, *arguments, grid, **options):
        self.devices |= {each.device.type for each in arguments if torch.is_tensor(each)}
        self.compiled.append((grid, *map(described, arguments), *options.values()))

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.launched.append((grid, *map(described, arguments), *options.values()))

        return launch


def described(argument):
    if isinstance(argument, torch.Tensor):
        return argument.dtype, tuple(argument.shape)
    return tuple(map(described, argument)) if isinstance(argument, tuple) else argument


@pytest.fixture
def kernels(monkeypatch):
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    from normuon_core.kernels import launches, source

    def forget():
        for name in KERNELS:
            getattr(launches, name).cache_clear()

    monkeypatch.setattr(fused, "is_worthwhile", lambda device: True)
    found = [Recorder(name) for name in KERNELS]
    for kernel in found:
        monkeypatch.setattr(source, kernel.name, kernel)
    # Launches are remembered with their kernels.
    forget()
    yield found
    forget()


def optimizer_of(*shapes):
    params = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    layout = MatrixLayout(reduction_axis=-1, output_axis=-2)
    return NorMuon(params, 0.02, layout=layout, backend="triton", compute_dtype=torch.float16)


def test_what_the_first_step_launches_was_compiled_before(kernels):
    optimizer = optimizer_of((6, 11), (6, 11), (3, 9, 5), (24, 8))
    optimizer.step()
    for kernel in kernels:
        assert kernel.launched, kernel.name
        assert kernel.compiled == kernel.launched, kernel.name


def test_a_plan_is_rehearsed_once_and_another_one_anew(kernels):
    optimizer = optimizer_of((6, 11))
    optimizer.step()
    once = [len(kernel.compiled) for kernel in kernels]
    optimizer.step()
    assert [len(kernel.compiled) for kernel in kernels] == once
    assert [len(kernel.launched) for kernel in kernels] == [2 * each for each in once]
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(4, 8))]})
    optimizer.param_groups[-1]["params"][0].grad = torch.ones(4, 8)
    optimizer.step()
    assert len(kernels[0].compiled) > once[0]


def test_a_rehearsal_has_no_memory_for_the_stacks(kernels):
    optimizer_of((6, 11)).step()
    (product,) = [kernel for kernel in kernels if kernel.name == "product"]
    assert product.devices == {"meta"}
