"""`torch_ref.NorMuon` as a PyTorch optimizer: groups, gradients, AdamW, dtypes and bad input."""

import math

import numpy as np
import pytest
import torch

from normuon_core import MatrixLayout
from torch_ref import NorMuon
from torch_ref.matrices.state import second_moments

STACK = MatrixLayout(-1, -2)


def parameter(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def set_gradient(param, seed=1):
    generator = torch.Generator().manual_seed(seed)
    param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("recipe", ["normuon", "moonlight", "optax_muon", "simple_muon"])
@pytest.mark.parametrize("optimizer", ["normuon", "adamw"])
def test_gradients_are_left_as_they_are(optimizer, recipe, dtype):
    param = parameter(4, 6, dtype=dtype)
    set_gradient(param)
    kept, handed = param.grad.clone(), param.grad
    NorMuon([param], lr=0.1, recipe=recipe, weight_decay=0.1, optimizer=optimizer).step()
    assert param.grad is handed
    assert torch.equal(param.grad, kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("optimizer", ["normuon", "adamw"])
def test_half_precision_parameters_move_by_the_rounded_float32_increment(optimizer, dtype):
    half, full = parameter(4, 6, dtype=dtype), parameter(4, 6, dtype=dtype)
    full = torch.nn.Parameter(full.detach().float())
    for step in range(3):
        for param in (half, full):
            set_gradient(param, step)
        full.grad = half.grad.float()
        start = half.detach().clone()
        with torch.no_grad():
            full.copy_(start)
        if step == 0:
            keywords = {"lr": 0.02, "weight_decay": 0.1, "optimizer": optimizer}
            optimizers = [NorMuon([param], **keywords) for param in (half, full)]
        for each in optimizers:
            each.step()
        increment = full.detach() - start.float()
        assert half.dtype == dtype
        torch.testing.assert_close(
            half.detach().float(), start.float() + increment, rtol=torch.finfo(dtype).eps, atol=1e-5
        )
    assert all(
        value.dtype == torch.float32
        for key, value in optimizers[0].state[half].items()
        if key != "step"
    )


def test_increment_is_rounded_to_the_parameters_dtype_before_it_is_added():
    param = parameter(32, 32, dtype=torch.bfloat16)
    set_gradient(param)
    start, gradient = param.detach().clone(), param.grad.float()
    keywords = {"recipe": "muon_basic", "momentum": 0.0, "orthogonalizer": lambda stack: stack}
    NorMuon([param], lr=0.03, **keywords).step()
    increment = gradient * -0.03
    assert torch.equal(param.detach(), start + increment.bfloat16())
    assert not torch.equal(param.detach(), (start.float() + increment).bfloat16())


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16, torch.float16, torch.float32])
def test_compute_dtype_reaches_the_products_and_the_state_stays_float32(compute_dtype):
    param = parameter(8, 16)
    set_gradient(param)
    optimizer = NorMuon([param], lr=0.1, compute_dtype=compute_dtype)
    start = param.detach().clone()
    optimizer.step()
    exact = parameter(8, 16, dtype=torch.float64)
    exact.grad = param.grad.double()
    NorMuon([exact], lr=0.1, compute_dtype=torch.float64).step()
    moved, wanted = param.detach() - start, exact.detach() - start
    error = (torch.linalg.norm(moved - wanted) / torch.linalg.norm(wanted)).item()
    low, high = {torch.float16: (1e-4, 1e-2), torch.float32: (0, 1e-4)}.get(
        compute_dtype, (1e-3, 1e-1)
    )
    assert low <= error < high
    state = optimizer.state[param]
    assert state["momentum"].dtype == state["second_moment"].dtype == torch.float32


def test_momentum_dtype_holds_the_buffer():
    param = parameter(4, 6)
    optimizer = NorMuon([param], lr=0.1, momentum_dtype=torch.bfloat16)
    set_gradient(param)
    optimizer.step()
    buffer = optimizer.state[param]["momentum"]
    assert buffer.dtype == torch.bfloat16
    assert torch.equal(buffer, (param.grad * 0.05).bfloat16())


def test_states_have_their_documented_shapes():
    layout = MatrixLayout(reduction_axis=0, output_axis=(1, 2), output_splits=(8, 4, 4))
    cases = [
        (parameter(4, 6), {}, [(4, 1)]),
        (parameter(2, 6, 4), {"recipe": "normuon_2026_08", "layout": STACK}, [(2, 6, 1)]),
        (parameter(2, 4, 6), {"recipe": "normuon_2026_08", "layout": STACK}, [(2, 1, 6)]),
        (parameter(5, 4, 3), {"layout": MatrixLayout((0, 2), 1)}, [(1, 4, 1)]),
        (parameter(5, 4, 4), {"layout": layout}, [(1, 4, 4)]),
    ]
    for param, keywords, shapes in cases:
        optimizer = NorMuon([param], lr=0.1, **keywords)
        set_gradient(param)
        optimizer.step()
        state = optimizer.state[param]
        assert [tuple(moment.shape) for moment in second_moments(state)] == shapes
        assert state["momentum"].shape == param.shape
        assert state["step"].item() == 1


def test_parameters_without_gradient_are_skipped():
    trained, idle = parameter(4, 6), parameter(4, 6, seed=2)
    start = idle.detach().clone()
    optimizer = NorMuon([trained, idle], lr=0.1, weight_decay=0.5)
    set_gradient(trained)
    optimizer.step()
    assert torch.equal(idle, start)
    assert idle not in optimizer.state


@pytest.mark.parametrize("shape", [(0, 4, 6), (4, 0)])
def test_parameters_without_entries_pass(shape):
    param = torch.nn.Parameter(torch.empty(shape))
    param.grad = torch.empty(shape)
    NorMuon([param], lr=0.1, layout=STACK).step()


def test_closure_is_evaluated_with_gradients_and_its_loss_returned():
    param = parameter(3, 3)
    optimizer = NorMuon([param], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    before = closure().item()
    assert optimizer.step(closure).item() == before
    assert closure().item() < before
    assert optimizer.step() is None


def test_zero_gradient_makes_no_update_but_decays():
    for recipe in ("normuon", "normuon_official", "normuon_paper", "moonlight", "dion_normuon"):
        param = parameter(4, 6)
        start = param.detach().clone()
        param.grad = torch.zeros_like(param)
        NorMuon([param], lr=0.1, recipe=recipe).step()
        assert torch.equal(param, start), recipe
    param.grad = torch.zeros_like(param)
    NorMuon([param], lr=0.1, recipe="muon_basic", weight_decay=0.5).step()
    torch.testing.assert_close(param.detach(), start * 0.95)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("recipe", ["normuon", "normuon_paper", "dion_normuon", "moonlight"])
def test_a_bad_gradient_reaches_its_own_matrix_only(recipe, bad):
    params = [parameter(3, 4, 6), parameter(4, 6), parameter(4, 6, dtype=torch.float64)]
    twins = [torch.nn.Parameter(param.detach().clone()) for param in params]
    for param, twin in zip(params, twins, strict=True):
        set_gradient(param)
        twin.grad = param.grad.clone()
    params[0].grad[1, 2, 3] = bad
    for weights in (params, twins):
        NorMuon(weights, lr=0.1, recipe=recipe, weight_decay=0.1, layout=STACK).step()
    assert params[0][1].isnan().all()
    assert torch.equal(params[0][[0, 2]], twins[0][[0, 2]])
    assert all(torch.equal(p, q) for p, q in zip(params[1:], twins[1:], strict=True))


def test_schedulers_and_changes_by_hand_are_read_at_every_step():
    param = parameter(4, 6)
    optimizer = NorMuon([param], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.0)
    set_gradient(param)
    optimizer.step()
    scheduler.step()
    start = param.detach().clone()
    optimizer.step()
    assert torch.equal(param, start)
    optimizer.param_groups[0].update(lr=0.1, weight_decay=1.0, momentum=0.0)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[param]["momentum"], param.grad)


def test_momentum_of_the_recipe_stands_in_the_group_for_cyclic_schedulers():
    param = parameter(4, 6)
    optimizer = NorMuon([param], lr=0.1, recipe="moonlight")
    assert optimizer.param_groups[0]["momentum"] == 0.95
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9, max_momentum=0.7)
    assert optimizer.param_groups[0]["momentum"] == 0.7


def test_every_keyword_may_be_set_by_group():
    params, twins = ([parameter(4, 6, seed=s) for s in range(2)] for _ in range(2))
    settings = [{"recipe": "moonlight", "lr": 0.3}, {"beta2": 0.5, "weight_decay": 0.2}]
    for param, twin in zip(params, twins, strict=True):
        set_gradient(param)
        set_gradient(twin)
    groups = [{"params": [p], **s} for p, s in zip(params, settings, strict=True)]
    NorMuon(groups, lr=0.1).step()
    for twin, keywords in zip(twins, settings, strict=True):
        NorMuon([twin], **{"lr": 0.1, **keywords}).step()
    assert all(torch.equal(p, q) for p, q in zip(params, twins, strict=True))


@pytest.mark.parametrize("shape", [(5,), (3, 4), ()])
def test_adamw_groups_equal_torch_adamw(shape):
    param, twin = (parameter(*shape, dtype=torch.float64) for _ in range(2))
    ours = NorMuon(
        [{"params": [param], "optimizer": "adamw", "lr": 0.01}],
        lr=9.0,
        adam_b1=0.8,
        adam_b2=0.97,
        adam_eps=1e-6,
        adam_weight_decay=0.1,
        weight_decay=7.0,
    )
    theirs = torch.optim.AdamW([twin], lr=0.01, betas=(0.8, 0.97), eps=1e-6, weight_decay=0.1)
    for step in range(20):
        set_gradient(param, step)
        set_gradient(twin, step)
        ours.step()
        theirs.step()
    torch.testing.assert_close(param, twin, rtol=1e-12, atol=1e-14)


def test_adamw_multipliers_act_on_the_rate_and_on_the_decay():
    params, twins = parameter(5, dtype=torch.float64), parameter(5, dtype=torch.float64)
    set_gradient(params)
    set_gradient(twins)
    keywords = {"optimizer": "adamw", "adam_weight_decay": 0.1}
    NorMuon([params], lr=0.1, lr_mul=2.0, wd_mul=3.0, **keywords).step()
    NorMuon([twins], lr=0.2, **{**keywords, "adam_weight_decay": 0.3}).step()
    torch.testing.assert_close(params, twins, rtol=1e-14, atol=0)


INTEGER = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False)
COMPLEX = torch.nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"recipe": "normuom"}, ValueError, "unknown recipe 'normuom'; did you mean 'normuon'"),
        ({"optimizer": "adam"}, ValueError, "group 0: unknown optimizer 'adam'; use .*'adamw'"),
        ({"algorithm": "grams"}, ValueError, "unknown algorithm 'grams'; use .*'gram'"),
        ({"shape_scale": "orignal"}, ValueError, "did you mean 'original'"),
        ({"recipe": "muon", "beta2": 0.9}, ValueError, "beta2=0.9 has no effect"),
        ({"lr": -0.1}, ValueError, "group 0: lr=-0.1; use a finite number of at least 0"),
        ({"lr": math.nan}, ValueError, "group 0: lr=nan"),
        ({"weight_decay": -1.0}, ValueError, "group 0: weight_decay=-1.0"),
        ({"momentum": 1.0}, ValueError, r"group 0: momentum=1.0; use a number in \[0, 1\)"),
        ({"beta2": -0.1}, ValueError, "group 0: beta2=-0.1"),
        ({"adam_b1": 1.5}, ValueError, "group 0: adam_b1=1.5"),
        ({"max_stack_bytes": 0}, ValueError, "group 0: max_stack_bytes=0"),
        ({"params": [parameter(5)]}, ValueError, r"parameter 0, of shape \(5,\).*'adamw'"),
        (
            {"params": [parameter(8, 4, 3, 3)]},
            ValueError,
            r"read in two ways; .*reduction_axis=\(1, 2, 3\), output_axis=0\) for a convolution",
        ),
        (
            {"params": [("conv.weight", parameter(8, 4, 3))]},
            ValueError,
            r"parameter 0 \(conv.weight\), of shape \(8, 4, 3\): 3 axes can be read in two ways;"
            r" .*=\(1, 2\), output_axis=0\) for a convolution, or .*=-1, output_axis=-2\) for a stack",
        ),
        (
            {"params": [("w", parameter(4, 6)), ("bias", parameter(5))]},
            ValueError,
            r"group 0, parameter 1 \(bias\), of shape \(5,\).*optimizer='adamw'",
        ),
        (
            {"layout": MatrixLayout(0, 2)},
            ValueError,
            r"group 0, parameter 0, of shape \(4, 6\).*output_axis=2 runs past the rank",
        ),
        (
            {"layout": MatrixLayout(-1, 0, (1, 2))},
            ValueError,
            r"group 0, parameter 0.*output_splits=\(1, 2\) sum to 3.*4 neurons",
        ),
        (
            {"lr_mul": [1.0, 2.0]},
            ValueError,
            r"group 0, parameter 0.*lr_mul of shape \(2,\) does not fit the batch axes \(\)",
        ),
        (
            {"optimizer": "adamw", "wd_mul": np.ones(4)},
            ValueError,
            r"wd_mul of shape \(4,\) does not fit the batch axes \(\)",
        ),
        ({"params": [COMPLEX]}, TypeError, "parameter 0.*complex64.*torch.view_as_real"),
        ({"params": [INTEGER]}, TypeError, "parameter 0.*torch.int64 cannot be trained"),
        (
            {"params": [parameter(4, 6, dtype=torch.float16)], "bf16_remainder": True},
            ValueError,
            "parameter 0.*float16; make it bfloat16",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_settings_raise_and_say_what_to_do(keywords, error, message):
    with pytest.raises(error, match=message):
        NorMuon(**{"params": [parameter(4, 6)], "lr": 0.1, **keywords})


def test_a_refused_group_is_not_added():
    optimizer = NorMuon([parameter(4, 6)], lr=0.1)
    with pytest.raises(ValueError, match=r"group 1: lr=-1\.0"):
        optimizer.add_param_group({"params": [parameter(4, 6)], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


def test_sparse_gradients_raise_before_anything_changes():
    dense, embedding = parameter(4, 6), torch.nn.Embedding(5, 3, sparse=True)
    start = dense.detach().clone()
    optimizer = NorMuon([dense, embedding.weight], lr=0.1)
    set_gradient(dense)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"group 0, parameter 1.*\(5, 3\).*sparse_coo"):
        optimizer.step()
    assert torch.equal(dense, start)
    assert not optimizer.state
