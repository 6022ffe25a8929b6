"""A step that a captured CUDA graph would not record is refused. Graphs themselves need a GPU."""

import contextlib

import pytest
import torch

from torch_ref import NorMuon
from torch_ref.steps import groups
from torch_ref.steps.capture import check_capture

FIRST, SECOND = torch.device("cuda:0"), torch.device("cuda:1")


@pytest.fixture
def cuda(monkeypatch):
    """Says what PyTorch would of two devices; `capturing` are those whose current stream is captured."""

    class Cuda:
        current, capturing = 0, set()

        @contextlib.contextmanager
        def device(self, device):
            before, self.current = self.current, device.index
            yield
            self.current = before

    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "current_device", lambda: cuda.current)
    monkeypatch.setattr(torch.cuda, "device", cuda.device)
    monkeypatch.setattr(
        torch.cuda, "is_current_stream_capturing", lambda: cuda.current in cuda.capturing
    )
    return cuda


def test_a_capture_on_another_device_is_refused(cuda):
    cuda.current, cuda.capturing = 1, {1}
    with pytest.raises(
        RuntimeError, match=r"on cuda:1, .* parameters on cuda:0: .*set_device\(0\)"
    ):
        check_capture([SECOND, FIRST])
    assert cuda.current == 1


@pytest.mark.parametrize(
    ("current", "capturing"), [(0, set()), (1, set()), (0, {0}), (1, {0, 1})], ids=str
)
def test_every_other_step_is_let_pass(cuda, current, capturing):
    cuda.current, cuda.capturing = current, capturing
    check_capture([FIRST, torch.device("cpu")])


def test_a_step_asks_before_it_counts(monkeypatch):
    def refuse(devices):
        raise RuntimeError(", ".join(map(str, devices)))

    monkeypatch.setattr(groups, "check_capture", refuse)
    param = torch.nn.Parameter(torch.ones(4, 8))
    param.grad = torch.ones(4, 8)
    optimizer = NorMuon([param], 0.1)
    with pytest.raises(RuntimeError, match="^cpu$"):
        optimizer.step()
    assert optimizer.state[param]["step"] == 0
    assert torch.equal(param, torch.ones(4, 8))
