"""A recipe that no kernel can run: "auto" leaves it to PyTorch and says so, "triton" is an error."""

import dataclasses
from typing import Literal

import pytest
import torch
from torch import nn

from normuon_core import RECIPES, recipes
from torch_ref import MatrixLayout, NorMuon, describe, polar_factor
from torch_ref.kernels import backend
from torch_ref.leaves.groups import whole_part
from torch_ref.steps.plan import GroupSpec, WeightSpec, plan_step

pytest.importorskip("triton", reason="Triton has no build for this platform")

CUDA = torch.device("cuda")


@pytest.fixture
def new_norm(monkeypatch):
    """A recipe whose neuron norm has an axis that the kernels have not learnt.

    PyTorch's own operations take it for "output", as every axis that is not "input" or "longer".
    """
    monkeypatch.setattr(recipes, "NeuronAxis", Literal["output", "brand_new"])
    record = recipes.NeuronNorm(axis="brand_new")  # pyright: ignore
    return dataclasses.replace(RECIPES["normuon"], neuron_norm=record)


def takes_kernels(recipe):
    """Whether "auto" takes the kernels on a GPU."""
    return backend.takes_kernels("auto", recipe, CUDA, [torch.float32])


def test_auto_leaves_the_recipe_to_pytorch(new_norm):
    assert takes_kernels(RECIPES["normuon"])
    assert not takes_kernels(new_norm)


def test_the_plan_of_a_gpu_has_the_recipe_among_the_eager_stacks(new_norm):
    param = nn.Parameter(torch.ones(4, 6))
    for recipe, engines in ((RECIPES["normuon"], (0, 1)), (new_norm, (1, 0))):
        (group,) = NorMuon([param], lr=0.1, recipe=recipe).param_groups
        view = MatrixLayout(-1, -2).on((4, 6))
        weight = WeightSpec(whole_part(view), *[torch.float32] * 3, CUDA)
        plan = plan_step((GroupSpec.of(group, recipe, [weight]),))
        assert (len(plan.eager), len(plan.triton)) == engines


def test_auto_steps_the_recipe(new_norm):
    param = nn.Parameter(torch.ones(4, 6))
    param.grad = torch.ones(4, 6)
    NorMuon([param], lr=0.1, recipe=new_norm).step()
    assert torch.any(param != 1)


def test_triton_is_an_error_with_a_remedy(new_norm):
    lacking = r"the kernels cannot run neuron_norm\.axis='brand_new'"
    message = rf"backend='triton': {lacking}; use backend='auto'\."
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=message):
        NorMuon([nn.Parameter(torch.ones(4, 6))], lr=0.1, recipe=new_norm, backend="triton")
    with pytest.raises(ValueError, match=message):
        describe(model, recipe=new_norm, backend="triton")


def test_describe_says_so(new_norm):
    """Once, and only where "auto" might have taken the kernels."""
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    said = "Engine eager steps all matrices: the kernels cannot run neuron_norm.axis='brand_new'."
    assert describe(model, recipe=new_norm).count(said) == 1
    assert "cannot run" not in describe(model)
    for keywords in ({"backend": "eager"}, {"orthogonalizer": torch.sign}):
        assert "cannot run" not in describe(model, recipe=new_norm, **keywords)


def test_the_polar_factor_alone_asks_too(monkeypatch):
    monkeypatch.setattr(recipes, "EpsRule", Literal["max", "add", "brand_new"])
    x, keywords = torch.ones(4, 8), dict(eps_rule="brand_new", compute_dtype=torch.float32)
    assert polar_factor(x, **keywords).shape == x.shape
    with pytest.raises(ValueError, match=r"cannot run eps_rule='brand_new'; use backend='auto'"):
        polar_factor(x, backend="triton", **keywords)
