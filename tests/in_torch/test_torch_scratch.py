"""What a step leaves behind and waits for: nothing that grows, no number read, no list of indices."""

import contextlib
import gc
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch.overrides import TorchFunctionMode

from normuon_core import RECIPES, MatrixLayout, Polar
from normuon_core.polynomials import POLAR_EXPRESS
from torch_ref import NorMuon
from torch_ref.leaves import part

STACK = MatrixLayout(-1, -2)


def weights(count=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(6, 11, generator=generator)) for _ in range(count)]


def set_gradients(params):
    for param in params:
        param.grad = torch.ones_like(param)


def sizes() -> dict[str, int]:
    """How much is remembered of launches, compiled kernels and constants."""
    from normuon_core.kernels import launches
    from torch_ref.kernels import launcher
    from torch_ref.steps import kernel_multipliers

    names = ("squares", "feed", "product", "neuron_squares", "statistics", "finish")
    found = {name: getattr(launches, name).cache_info().currsize for name in names}
    gc.collect()
    constants = [len(known) for known in kernel_multipliers._MADE.values()]
    return found | {"compiled": len(launcher._COMPILED), "constants": sum(constants)}


SHORT = replace(RECIPES["normuon"], polar=Polar(coefficients=POLAR_EXPRESS[:1]))
"""One step of the polynomial: the interpreter takes a moment for each product."""

QUICK = dict(recipe=SHORT, compute_dtype=torch.float32, algorithm="standard", backend="triton")


def test_steps_of_changing_numbers_leave_nothing_more_behind(interpreted):
    del interpreted
    params = weights()
    optimizer = NorMuon(params, lr=0.1, weight_decay=0.1, **QUICK)
    group = optimizer.param_groups[0]
    kept = []
    for step in range(6):
        set_gradients(params)
        number = 0.5 + step / 100
        group.update(momentum=number, beta2=number, lr_mul=number, wd_mul=number)
        group.update(lr=torch.tensor(number) if step % 2 else number, weight_decay=number)
        optimizer.step()
        kept.append(sizes())
    assert kept[1:] == kept[:1] * 5
    assert kept[0]["constants"] == 2 * len(params)


def test_models_that_are_gone_leave_nothing(interpreted):
    del interpreted

    def train_one():
        params = weights()
        optimizer = NorMuon(params, lr=0.1, lr_mul=0.3, **QUICK)
        set_gradients(params)
        optimizer.step()
        return sizes()

    within, within_again = train_one(), train_one()
    assert within == within_again
    after = sizes()
    assert after == within | {"constants": after["constants"]}
    assert after["constants"] <= within["constants"] - 4


@pytest.mark.parametrize("multiplier", [0.25, [0.25, 2.0]], ids=["number", "array"])
def test_a_multiplier_that_changes_is_felt_at_once(interpreted, multiplier):
    """What is kept of it from step to step is brought up to date."""
    del interpreted

    def last_move(*multipliers):
        param = torch.nn.Parameter(torch.zeros(2, 6, 11))
        optimizer = NorMuon([param], lr=0.1, momentum=0.0, layout=STACK, **QUICK)
        for each in multipliers:
            array = torch.as_tensor(each, dtype=torch.float64)
            optimizer.param_groups[0]["lr_mul"] = array if array.ndim else each
            param.grad = torch.eye(6, 11).expand(2, 6, 11).contiguous()
            before = param.detach().clone()
            optimizer.step()
            optimizer.state[param]["second_moment"].zero_()
        return param.detach() - before

    # The same update added to other weights: measured 1.5e-8 apart, of moves of 0.02 and more.
    moved, wanted = last_move(1.0, multiplier), last_move(multiplier)
    assert torch.allclose(moved, wanted, rtol=0, atol=6e-8)
    assert not torch.allclose(wanted, last_move(1.0), rtol=0, atol=1e-3)


def test_multipliers_on_the_cpu_are_not_sent_at_every_step(interpreted, monkeypatch):
    del interpreted
    made = []
    full = torch.full
    monkeypatch.setattr(torch, "full", lambda *a, **k: made.append(1) or full(*a, **k))
    # As on a GPU, where an array of multipliers lies elsewhere than the weight.
    from torch_ref.steps import kernel_multipliers

    weight = mock.Mock(state={"momentum": torch.zeros(2, 3)})
    weight.param.device, weight.view = torch.device("meta"), STACK.on((2, 3, 4))
    for _ in range(3):
        weight.wd_mul = torch.tensor([1.0, 2.0], dtype=torch.float64)
        kernel_multipliers.KernelMultipliers(weight).decay(0, *weight.view.runs)
    assert len(made) == 2


def test_the_users_own_allocator_survives_a_launch(monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.runtime import _allocation

    from torch_ref.kernels import launcher

    def users(size, alignment, stream):
        raise NotImplementedError

    before = _allocation._allocator.get()
    triton.set_allocator(users)
    try:
        with (
            contextlib.suppress(InterruptedError),
            launcher._scratch_on(torch.device("cuda")),
        ):
            assert _allocation._allocator.get() is not users
            raise InterruptedError
        assert _allocation._allocator.get() is users
    finally:
        triton.set_allocator(before)


GROUPS = {
    "matrices": {},
    "bias-corrected": {"recipe": "optax_muon"},
    "split": {"layout": MatrixLayout(-1, -2, (4, 2))},
    "rates twice": {"recipe": "normuon_2026_08", "weight_decay": 0.1},
    "adamw": {"optimizer": "adamw", "adam_weight_decay": 0.1},
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_default_device_does_not_matter(name):
    """Nothing can be read from "meta": whatever a step makes there by mistake raises."""
    results = []
    for device in (None, "meta"):
        params = weights(1)
        params[0].grad = torch.ones_like(params[0])
        torch.set_default_device(device)
        try:
            optimizer = NorMuon(params, lr=0.1, lr_mul=2.0, **GROUPS[name])
            for _ in range(2):
                optimizer.step()
        finally:
            torch.set_default_device(None)
        results.append(params[0].detach())
    assert torch.equal(*results)


def test_multipliers_given_as_lists_keep_their_numbers_on_any_default_device():
    torch.set_default_device("meta")
    try:
        param = torch.nn.Parameter(torch.zeros(2, 4, 3, device="cpu"))
        optimizer = NorMuon([param], lr=0.1, lr_mul=[1.0, 2.0], layout=STACK)
    finally:
        torch.set_default_device(None)
    assert optimizer.param_groups[0]["lr_mul"].tolist() == [1.0, 2.0]


class ReadsBack(TorchFunctionMode):
    """Counts what would wait for a GPU: numbers read out of tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        del types
        reading = ("item", "tolist", "__float__", "__int__", "__bool__", "__index__")
        self.count += getattr(func, "__name__", "") in reading
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("as_tensors", [False, True], ids=["numbers", "tensors"])
@pytest.mark.parametrize("name", GROUPS)
def test_no_number_is_read_back_in_a_step(name, as_tensors):
    params = weights(2)
    optimizer = NorMuon(params, lr=0.1, **GROUPS[name])
    if as_tensors:
        for key in ("lr", "momentum", "weight_decay"):
            # AdamW's groups have betas.
            number = optimizer.param_groups[0].get(key)
            if number is not None:
                optimizer.param_groups[0][key] = torch.tensor(number)
    set_gradients(params)
    with ReadsBack() as reads:
        optimizer.step()
        assert reads.count == 0
        params[0].sum().item()
        assert reads.count == 1


def test_a_weight_that_lies_whole_has_no_lists_of_indices(monkeypatch):
    def refuse(view, region):
        raise AssertionError("indices of a whole weight")

    monkeypatch.setattr(part, "stack_indices", refuse)
    params = [*weights(2), torch.nn.Parameter(torch.ones(3, 6, 4))]
    optimizer = NorMuon(params, lr=0.1, layout=STACK)
    set_gradients(params)
    optimizer.step()
    view = STACK.on((6, 11))
    with pytest.raises(AssertionError, match="indices"):
        _ = part.Part(view, ((0, 3), (0, 11))).local


def test_interpreted_bfloat16_products_are_refused_with_the_weights_name(interpreted):
    del interpreted
    square = torch.nn.Parameter(torch.ones(16, 16))
    message = r"16 x 16.*bfloat16.*compute_dtype float32 or float16"
    with pytest.raises(ValueError, match=r"group 0, parameter 0.*\(16, 16\): .*" + message):
        NorMuon([square], lr=0.1, backend="triton")
    for dtype in (torch.float16, torch.float32):
        NorMuon([square], lr=0.1, backend="triton", compute_dtype=dtype)
    from torch_ref import polar_factor

    with pytest.raises(ValueError, match=message):
        polar_factor(torch.ones(16, 16), backend="triton")
