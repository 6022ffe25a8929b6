"""What `torch_ref.NorMuon` keeps between steps and runs: state dicts and the bfloat16 remainder."""

import copy
import io
import pickle

import pytest
import torch

from normuon_core import RECIPES, MatrixLayout
from torch_ref import NorMuon, join_remainder, split_remainder

STACK = MatrixLayout(-1, -2)
QKV = MatrixLayout(-1, -2, (4, 2, 2))


def build(dtype, **keywords):
    """A matrix, a fused projection and a bias, in three groups."""
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype))
        for shape in ((3, 4, 6), (8, 6), (5,))
    ]
    groups = [
        {"params": params[:1], "layout": STACK, "lr_mul": [1.0, 2.0, 0.5]},
        {"params": params[1:2], "layout": QKV, "recipe": RECIPES["normuon_2026_08"]},
        {"params": params[2:], "optimizer": "adamw", "adam_weight_decay": 0.1},
    ]
    return params, NorMuon(groups, lr=1e-3, weight_decay=0.1, **keywords)


def train(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            gradient = torch.randn(param.shape, generator=generator).bfloat16()
            param.grad = gradient.to(param.dtype)
        optimizer.step()


def tensors(optimizer):
    for number, state in sorted(optimizer.state_dict()["state"].items()):
        for key, value in sorted(state.items()):
            yield number, key.partition(".")[0], value


def assert_same(optimizer, other):
    for (*name, value), (*other_name, other_value) in zip(
        tensors(optimizer), tensors(other), strict=True
    ):
        assert name == other_name
        assert value.dtype == other_value.dtype, name
        assert torch.equal(value, other_value), name


def through_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


SETTINGS = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"bf16_remainder": True}),
    (torch.bfloat16, {"momentum_dtype": torch.float16}),
    (torch.float32, {"momentum_dtype": torch.bfloat16}),
    (torch.bfloat16, {"momentum_dtype": torch.int8}),
    (torch.float64, {}),
]


@pytest.mark.parametrize(("dtype", "keywords"), SETTINGS)
@pytest.mark.parametrize("way", [copy.deepcopy, through_file], ids=["memory", "file"])
def test_a_run_continues_exactly_from_a_state_dict(way, dtype, keywords):
    params, optimizer = build(dtype, **keywords)
    train(params, optimizer, range(3))
    others, other = build(dtype, **keywords)
    with torch.no_grad():
        for mine, theirs in zip(others, params, strict=True):
            mine.copy_(theirs)
    other.load_state_dict(way(optimizer.state_dict()))
    assert_same(other, optimizer)
    train(params, optimizer, range(3, 6))
    train(others, other, range(3, 6))
    assert_same(other, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def test_loading_copies_and_does_not_share():
    params, optimizer = build(torch.float32)
    train(params, optimizer, [0])
    _, other = build(torch.float32)
    other.load_state_dict(optimizer.state_dict())
    train(params, optimizer, [1])
    mine, theirs = (next(tensors(each))[2] for each in (optimizer, other))
    assert not torch.equal(mine, theirs)


def test_state_dtypes_are_the_documented_ones():
    params, optimizer = build(torch.bfloat16, bf16_remainder=True)
    train(params, optimizer, [0])
    _, other = build(torch.bfloat16, bf16_remainder=True)
    other.load_state_dict(through_file(optimizer.state_dict()))
    for each in (optimizer, other):
        dtypes = {key: value.dtype for _, key, value in tensors(each)}
        assert dtypes == {
            "momentum": torch.float32,
            "second_moment": torch.float32,
            "exp_avg": torch.float32,
            "exp_avg_sq": torch.float32,
            "remainder": torch.uint16,
            "step": torch.int64,
        }


def test_load_hooks_see_and_change_what_is_loaded():
    params, optimizer = build(torch.bfloat16)
    train(params, optimizer, [0])
    _, other = build(torch.bfloat16)
    seen = []

    def forget_momentum(_, saved):
        for state in saved["state"].values():
            if "momentum" in state:
                state["momentum"] = torch.zeros_like(state["momentum"])
        return saved

    def look(loaded):
        seen.extend(value for _, key, value in tensors(loaded) if key == "momentum")

    other.register_load_state_dict_pre_hook(forget_momentum)
    other.register_load_state_dict_post_hook(look)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(seen) == 2
    assert all(value.dtype == torch.float32 and not value.any() for value in seen)


def test_orthogonalizer_is_not_saved_and_survives_loading():
    def orthogonalizer(stack):
        return stack

    _, optimizer = build(torch.float32, orthogonalizer=orthogonalizer)
    saved = optimizer.state_dict()
    assert all(group["orthogonalizer"] is None for group in saved["param_groups"])
    optimizer.load_state_dict(through_file(saved))
    assert optimizer.param_groups[0]["orthogonalizer"] is orthogonalizer


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_copies_of_the_optimizer_go_on_like_the_original(way):
    params, optimizer = build(torch.bfloat16, bf16_remainder=True)
    train(params, optimizer, range(2))
    twin = way(optimizer)
    copies = [param for group in twin.param_groups for param in group["params"]]
    train(params, optimizer, range(2, 4))
    train(copies, twin, range(2, 4))
    assert_same(twin, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_halves_join_to_the_same_bits():
    special = [0.0, -0.0, 1.0, -1.0, 1e-45, -3e-39, float("inf"), -float("inf"), 3.4e38, 0.1]
    weight = torch.cat([torch.tensor(special), torch.randn(1000) * 1e-3])
    high, low = split_remainder(weight)
    assert (high.dtype, low.dtype) == (torch.bfloat16, torch.uint16)
    joined = join_remainder(high, low)
    assert torch.equal(joined.view(torch.int32), weight.view(torch.int32))
    assert (high.float().abs() <= weight.abs()).all()


def test_remainder_run_is_a_float32_run_bit_for_bit():
    halves, optimizer = build(torch.bfloat16, bf16_remainder=True)
    wholes, reference = build(torch.float32)
    plain, without = build(torch.bfloat16)
    for step in range(50):
        for params, each in ((halves, optimizer), (wholes, reference), (plain, without)):
            train(params, each, [step])
        for half, whole in zip(halves, wholes, strict=True):
            joined = join_remainder(half.detach(), optimizer.state[half]["remainder"])
            assert torch.equal(joined, whole), step
    # Without the remainder the same increments are too small for most entries.
    lost = [
        (half != whole.bfloat16()).float().mean().item()
        for half, whole in zip(plain, wholes, strict=True)
    ]
    assert max(lost) > 0.3


def test_wider_parameters_have_no_remainder():
    params, optimizer = build(torch.float32, bf16_remainder=True)
    train(params, optimizer, [0])
    assert all("remainder" not in optimizer.state[param] for param in params)
