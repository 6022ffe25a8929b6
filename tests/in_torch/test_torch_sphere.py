"""Spheres in PyTorch: what its optimizer and its state dict make of a hyperball."""

import copy

import pytest
import torch

from normuon_core import MatrixLayout
from torch_ref import NorMuon, describe, join_remainder, to_sphere

SPLIT = MatrixLayout(2, 1, output_splits=(4, 3, 3))
BLOCKS = (slice(0, 4), slice(4, 7), slice(7, 10))


def made(dtype=torch.float32, **keywords):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(2, 10, 6).to(dtype))
    keywords = (
        dict(lr=0.1, recipe="normuon_h", layout=SPLIT, compute_dtype=torch.float32) | keywords
    )
    return param, NorMuon([param], **keywords)


def train(param, optimizer, steps):
    for _ in range(steps):
        param.grad = torch.randn(param.shape).to(param.dtype)
        optimizer.step()


def norms(param):
    return torch.stack([param.detach().double()[:, b].norm(dim=(1, 2)) for b in BLOCKS])


def test_every_block_of_a_stack_keeps_its_norm():
    param, optimizer = made()
    before, start = norms(param), param.detach().clone()
    train(param, optimizer, 100)
    assert (norms(param) / before - 1).abs().max() <= 4 * torch.finfo(torch.float32).eps
    assert (param - start).abs().max() > 0.5
    assert optimizer.state[param]["radius"].shape == (2, 3, 1)


def test_bfloat16_weights_with_a_remainder_keep_their_norm():
    """Measured without: 4e-4 off."""
    off = []
    for remainder in (True, False):
        param, optimizer = made(torch.bfloat16, bf16_remainder=remainder)
        before = norms(param)
        train(param, optimizer, 20)
        weight = param.detach()
        if remainder:
            weight = join_remainder(weight, optimizer.state[param]["remainder"])
        off.append((norms(weight) / before - 1).abs().max())
    assert off[0] <= 4 * torch.finfo(torch.float32).eps < off[1]


def test_a_saved_run_goes_on_with_its_radius():
    param, optimizer = made()
    train(param, optimizer, 2)
    other, second = made()
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        other.copy_(param)
    second.load_state_dict(saved)
    for each, own in ((param, optimizer), (other, second)):
        torch.manual_seed(1)
        train(each, own, 2)
    assert torch.equal(param, other)


def test_describe_and_triton_say_that_the_kernels_have_no_hyperball():
    layers = [torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 16)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 4))
    text = describe(model, recipe="muon_h")
    assert "radius 8" in text
    with pytest.raises(ValueError, match="cannot run hyperball"):
        made(backend="triton")


def test_a_slice_without_a_tangent_is_left_alone_and_a_nan_is_not():
    w, u = torch.randn(4, 8), torch.randn(4, 8)
    u[0], u[1, 2] = 3.3 * w[0], float("nan")
    increment = to_sphere(u, w, lr=0.1)
    assert not increment[0].any()
    assert increment[1].isnan().all()
    torch.testing.assert_close((w + increment)[2:].norm(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match="radius=0; use"):
        to_sphere(u, w, lr=0.1, radius=0)
    with pytest.raises(ValueError, match="did you mean 'geodesic'"):
        to_sphere(u, w, lr=0.1, path="geodesics")  # pyright: ignore
