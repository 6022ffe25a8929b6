"""The AdamW beside the matrices in PyTorch: updates at every k-th step, multipliers by name."""

import copy

import pytest
import torch
from torch import nn

from torch_ref import NorMuon, param_groups


def test_a_run_that_is_saved_between_two_updates_goes_on():
    torch.manual_seed(0)
    gradients = torch.randn(6, 5)

    def optimizer_of(param):
        return NorMuon([param], lr=0.1, optimizer="adamw", adam_every=3)

    def steps(param, optimizer, some):
        for gradient in some:
            param.grad = gradient.clone()
            optimizer.step()

    whole = nn.Parameter(torch.ones(5))
    steps(whole, optimizer_of(whole), gradients)
    first = nn.Parameter(torch.ones(5))
    optimizer = optimizer_of(first)
    steps(first, optimizer, gradients[:2])
    assert torch.equal(first.detach(), torch.ones(5))
    second = nn.Parameter(first.detach().clone())
    resumed = optimizer_of(second)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(second, resumed, gradients[2:])
    assert torch.equal(second, whole)
    assert not torch.equal(second, torch.ones(5))


def model() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 7))


def test_multipliers_by_name_make_groups_of_their_own():
    groups = param_groups(
        model(), lr=0.1, adam_lr=0.01, lr_mul={"0.*": 0.3, "*": 2.0}, wd_mul={"*.bias": 0.0}
    )
    found = {name: group for group in groups for name in group["param_names"]}
    assert {name: (group["lr_mul"], group["wd_mul"]) for name, group in found.items()} == {
        "0.weight": (0.3, 1.0),
        **{f"{i}.weight": (2.0, 1.0) for i in (1, 2, 3)},
        **{f"{i}.bias": (2.0, 0.0) for i in (1, 2, 3)},
    }
    assert found["1.weight"] is found["2.weight"]
    assert found["1.bias"] is found["3.bias"]
    assert found["3.weight"]["optimizer"] == "adamw"
    NorMuon(groups, lr=0.1)
    plain = param_groups(model(), lr=0.1, adam_lr=0.01, lr_mul=0.5)
    assert [group["lr_mul"] for group in plain] == [0.5, 0.5]


def test_a_pattern_that_meets_no_parameter_is_refused():
    with pytest.raises(ValueError, match=r"'\*embde\*' of lr_mul meets no parameter; .*0.weight"):
        param_groups(model(), lr=0.1, adam_lr=0.01, lr_mul={"*embde*": 0.3})
