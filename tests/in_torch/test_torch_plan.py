"""The plan of a step: `describe` prints it, an optimizer makes it once, and no stale one is used."""

import copy
import gc
import pickle
import re
import weakref
from itertools import groupby

import pytest
import torch
from torch import nn

from torch_ref import MatrixLayout, NorMuon, describe, param_groups
from torch_ref.stages.stack import StackStages

RATES = dict(lr=0.02, adam_lr=3e-4)
OUT_IN = MatrixLayout(reduction_axis=-1, output_axis=-2)


class Model(nn.Module):
    """Splits, a stack, a convolution that the kernels cannot read in place, and odd sizes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.experts = nn.Parameter(torch.zeros(5, 8, 24))
        self.ragged = nn.Linear(13, 7)
        self.conv = nn.ConvTranspose2d(8, 8, (1, 3))
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(24, 8)
        self.head = nn.Linear(8, 9)


def model_with_gradients():
    torch.manual_seed(0)
    model = Model()
    for param in model.parameters():
        param.data = torch.randn_like(param)
        param.grad = torch.randn_like(param)
    return model


@pytest.fixture
def ran(monkeypatch):
    """Of every stack that a step runs: (what its matrices share, engine, sides, form, dtype, count)."""
    from torch_ref.steps import fused

    stacks = []
    eager, kernels = StackStages.__call__, fused.step_stack

    def step_eagerly(stages, u, moment, beta2):
        form = stages.form
        if stages.orthogonalizer is not None:
            form = "orthogonalizer", str(u.dtype).removeprefix("torch.")
        stacks.append((stages, "eager", tuple(u.shape[1:]), *form, len(u)))
        return eager(stages, u, moment, beta2)

    def step_by_kernels(launch, device, pieces, recipe, *, form, dtype):
        count = sum(piece.count for piece in pieces)
        stacks.append((recipe, "triton", pieces[0].block.geometry.whole, form, dtype, count))
        kernels(launch, device, pieces, recipe, form=form, dtype=dtype)

    monkeypatch.setattr(StackStages, "__call__", step_eagerly)
    monkeypatch.setattr(fused, "step_stack", step_by_kernels)
    return stacks


def printed_plan(text):
    """The cells of the second table of a description."""
    lines = text.split("\n\n")[1].splitlines()
    assert lines[0].startswith("matrices x (rows, columns)")
    return [re.split(r"  +", line) for line in lines[2:]]


def lines_of(stacks):
    for (_, engine, sides, form, dtype), alike in groupby(stacks, key=lambda stack: stack[:5]):
        counts = [count for *_, count in alike]
        yield [f"{sum(counts)} x {sides}", engine, form, dtype, str(len(counts))]


@pytest.mark.parametrize("max_stack_bytes", [None, 20_000], ids=["whole stacks", "cut stacks"])
@pytest.mark.parametrize(
    "keywords",
    [
        dict(backend="eager"),
        dict(backend="auto", algorithm="gram", compute_dtype=torch.float32),
        dict(backend="triton", compute_dtype=torch.float32, steps=2),
        dict(orthogonalizer=lambda u: u),
    ],
    ids=["eager", "auto", "triton", "orthogonalizer"],
)
def test_the_table_is_the_plan_of_the_step(ran, request, keywords, max_stack_bytes):
    engine = "eager"
    if keywords.get("backend") == "triton":
        request.getfixturevalue("interpreted")
        engine = "triton"
    model = model_with_gradients()
    layouts = {"experts": OUT_IN, "conv.weight": MatrixLayout((0, 3), (1, 2))}
    keywords = {**keywords, "layouts": layouts, "max_stack_bytes": max_stack_bytes}
    printed = printed_plan(describe(model, **keywords))
    ran.clear()
    NorMuon(param_groups(model, **RATES, **keywords), lr=1.0).step()
    assert sorted(printed) == sorted(lines_of(ran))
    assert {row[1] for row in printed} == {engine}
    cut = any(int(row[-1]) > 1 for row in printed)
    assert cut == (max_stack_bytes is not None)


def test_a_model_on_the_meta_device_is_planned_for_the_backend_that_is_named():
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(768, 3072), nn.Linear(3072, 768), nn.Linear(768, 9))
    assert printed_plan(describe(model, backend="triton")) == [
        ["2 x (768, 3072)", "triton", "gram", "float16", "1"]
    ]
    assert printed_plan(describe(model, backend="auto")) == [
        ["1 x (3072, 768)", "eager", "standard", "bfloat16", "1"],
        ["1 x (768, 3072)", "eager", "standard", "bfloat16", "1"],
    ]


def test_a_description_refuses_kernels_for_dtypes_that_they_do_not_take():
    pytest.importorskip("triton", reason="Triton has no build for this platform")
    with pytest.raises(ValueError, match="backend='triton' takes .*, not torch.float64"):
        describe(nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2)).double(), backend="triton")


def weights(**keywords):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(6, 4)) for _ in range(3)]
    for param in params:
        param.grad = torch.randn_like(param)
    return params, NorMuon(params, lr=0.02, weight_decay=0.1, **keywords)


def plans_made(optimizer):
    return optimizer._plans.cache_info().misses


def test_one_plan_serves_every_step_whatever_the_rates():
    params, optimizer = weights()
    for step in range(4):
        number = 0.9 + 0.01 * step
        optimizer.param_groups[0] |= {"lr": 0.1 / (1 + step), "momentum": number, "beta2": number}
        optimizer.step()
    assert plans_made(optimizer) == 1
    params[1].grad = None
    optimizer.step()
    assert plans_made(optimizer) == 2
    params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    assert plans_made(optimizer) == 2


CHANGES = {
    "steps": dict(steps=2),
    "coefficients": dict(coefficients="newton_schulz"),
    "beta2": dict(beta2=0.5),
    "recipe": dict(recipe="normuon_paper"),
    "layout": dict(layout=MatrixLayout(1, 0, output_splits=2)),
    "orthogonalizer": dict(orthogonalizer=torch.sign),
    "compute_dtype": dict(compute_dtype=torch.float32),
    "algorithm": dict(algorithm="gram"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_group_is_stepped_by_a_new_plan(change):
    """As an optimizer steps it that has the settings from the start, and the same state."""
    (params, optimizer), (others, unchanged) = weights(), weights()
    for each in (optimizer, unchanged):
        each.step()
    fresh_params, fresh = weights(**change)
    for param, fresh_param in zip(params, fresh_params, strict=True):
        fresh_param.data.copy_(param.data)
        fresh.state[fresh_param] = copy.deepcopy(optimizer.state[param])
    optimizer.param_groups[0] |= change
    for each in (optimizer, unchanged, fresh):
        # A second step of one gradient would hide beta2: all neurons' second moments would grow alike.
        for param in each.param_groups[0]["params"]:
            param.grad = param.grad.flip(0)
        each.step()
    for param, fresh_param, other in zip(params, fresh_params, others, strict=True):
        assert torch.equal(param, fresh_param)
        assert not torch.equal(param, other)


def test_matrices_of_groups_with_other_betas_share_a_stack_and_keep_their_betas(ran):
    """Each is stepped as by an optimizer of its own."""
    betas, expected = [0.5, 0.9, 0.95], []
    for beta2 in betas:
        params, optimizer = weights(beta2=beta2)
        for each in (optimizer.step, lambda p=params: p[0].grad.copy_(p[0].grad.flip(0))) * 2:
            each()
        expected.append(params[0])
    ran.clear()
    params, optimizer = weights()
    own = [{"params": [param], "beta2": beta2} for param, beta2 in zip(params, betas, strict=True)]
    optimizer = NorMuon(own, lr=0.02, weight_decay=0.1)
    for param in params[1:]:
        param.data.copy_(params[0])
        param.grad.copy_(params[0].grad)
    for _ in range(2):
        optimizer.step()
        for param in params:
            param.grad.copy_(param.grad.flip(0))
    assert [count for *_, count in ran] == [3, 3]
    for param, other in zip(params, expected, strict=True):
        assert torch.equal(param, other)
    assert not torch.equal(params[0], params[1])


def test_a_smaller_bound_on_stacks_counts_from_the_next_step(ran):
    _, optimizer = weights()
    optimizer.step()
    optimizer.param_groups[0]["max_stack_bytes"] = 1
    optimizer.step()
    assert [count for *_, count in ran] == [3, 1, 1, 1]


def test_a_parameter_that_changes_its_dtype_is_stepped_by_a_new_plan(ran):
    params, optimizer = weights(orthogonalizer=torch.sign)
    optimizer.step()
    params[0].grad = None
    params[0].data = params[0].data.double()
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert [stack[4:] for stack in ran] == [("float32", 3), ("float64", 1), ("float32", 2)]


def test_plans_hold_no_parameter():
    params, optimizer = weights()
    optimizer.step()
    plans, alive = optimizer._plans, [weakref.ref(param) for param in params]
    del params, optimizer
    gc.collect()
    assert plans.cache_info().currsize == 1
    assert [ref() for ref in alive] == [None] * 3


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_a_copy_makes_plans_of_its_own(copied):
    params, optimizer = weights()
    optimizer.step()
    other = copied(optimizer)
    for param, own in zip(params, other.param_groups[0]["params"], strict=True):
        own.grad = param.grad.clone()
    optimizer.step()
    other.step()
    assert (plans_made(optimizer), plans_made(other)) == (1, 1)
    for param, own in zip(params, other.param_groups[0]["params"], strict=True):
        assert torch.equal(param, own)


def test_a_loaded_state_leaves_the_plan_alone():
    _, optimizer = weights()
    optimizer.step()
    before = optimizer._plans
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert optimizer._plans is before
    assert plans_made(optimizer) == 1
