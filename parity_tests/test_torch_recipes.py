"""`torch_ref.NorMuon` in float64: every recipe and layout against the oracle, and stacking."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon_core import RECIPES, Decay, MatrixLayout
from parity_tests import oracle
from torch_ref import NorMuon
from torch_ref.matrices.views import bytes_per_matrix, from_blocks, from_stack, to_blocks, to_stack

FLOAT64 = {"compute_dtype": torch.float64}
SCHEDULE = [(0.02, 0.9), (0.05, 0.95), (0.01, 0.8)]


def relative_error(found, wanted):
    found, wanted = np.ravel(found), np.ravel(wanted)
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def gradients(shape, steps=3):
    """Gradients that are hard on every rule: a zero row and column, and a nearly zero matrix."""
    rng = np.random.default_rng(7)
    result = rng.standard_normal((steps, *shape))
    result[:, ..., 1, :] = 0.0
    result[..., 2] = 0.0
    result[-1] *= 1e-7
    return result


def check_against_oracle(recipe, layout, shape, *, weight_decay=0.3, lr_mul=1.0, wd_mul=1.0, **kw):
    start = np.random.default_rng(3).standard_normal(shape)
    start[..., 0] = 0.0
    param = torch.nn.Parameter(torch.tensor(start))
    optimizer = NorMuon(
        [param],
        lr=0.0,
        recipe=recipe,
        weight_decay=weight_decay,
        layout=layout,
        lr_mul=lr_mul,
        wd_mul=wd_mul,
        **{**FLOAT64, **kw},
    )
    expected, state = start, oracle.WeightState()
    recipe = RECIPES[recipe] if isinstance(recipe, str) else recipe
    for g, (lr, mu) in zip(gradients(shape), SCHEDULE, strict=True):
        param.grad = torch.tensor(g)
        optimizer.param_groups[0].update(lr=lr, momentum=mu)
        optimizer.step()
        expected = oracle.step_weight(
            recipe,
            layout,
            expected,
            g,
            state,
            lr=lr,
            mu=mu,
            weight_decay=weight_decay,
            lr_mul=np.asarray(lr_mul, float),
            wd_mul=np.asarray(wd_mul, float),
        )
        assert relative_error(param.detach().numpy() - start, expected - start) < 1e-11


OUT_IN, IN_OUT = MatrixLayout(-1, -2), MatrixLayout(-2, -1)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5), (2, 6, 4)])
@pytest.mark.parametrize("layout", [OUT_IN, IN_OUT], ids=["out_in", "in_out"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_follows_the_oracle(recipe, layout, shape):
    check_against_oracle(recipe, layout, shape)


@pytest.mark.parametrize("recipe", ["normuon", "normuon_paper", "normuon_2026_08"])
def test_gram_form_makes_the_same_update(recipe):
    check_against_oracle(recipe, OUT_IN, (4, 9), algorithm="gram")


LAYOUTS = [
    (MatrixLayout(0, (1, 2)), (6, 4, 3)),
    (MatrixLayout(0, 2), (6, 4, 3)),
    (MatrixLayout((0, 2), 1), (3, 5, 4)),
    (MatrixLayout((1, 3), 2), (2, 3, 4, 3)),
    (MatrixLayout((0, 1), 3), (2, 3, 4, 5)),
    (MatrixLayout(1, (3, 2)), (2, 3, 4, 3)),
    (MatrixLayout(-1, -2, (4, 3, 3)), (10, 6)),
    (MatrixLayout(0, 1, (4, 5)), (6, 9)),
    (MatrixLayout(1, (2, 3), (4, 3, 5)), (2, 5, 4, 3)),
    (MatrixLayout(0, (3, 1), (5, 4)), (4, 3, 2, 3)),
]


@pytest.mark.parametrize("recipe", ["normuon", "normuon_2026_08", "normuon_paper"])
@pytest.mark.parametrize("case", LAYOUTS, ids=str)
def test_every_layout_follows_the_oracle(case, recipe):
    layout, shape = case
    check_against_oracle(recipe, layout, shape)


CAUTIOUS_OUTSIDE = dataclasses.replace(RECIPES["normuon"], decay=Decay(inside_scale=False))


# A rate of zero shows that the mask looks at the update before its scale.
@pytest.mark.parametrize(
    "recipe", ["normuon", "normuon_2026_08", "normuon_official", CAUTIOUS_OUTSIDE]
)
@pytest.mark.parametrize("array", [np.asarray, torch.tensor], ids=["numpy", "torch"])
def test_multipliers_act_on_their_own_matrix(recipe, array):
    lr_mul, wd_mul = array([[1.0, 0.3, 0.0]]), array([[1.0, 0.0, 3.0], [2.0, 1.0, 1.0]])
    check_against_oracle(recipe, OUT_IN, (2, 3, 5, 4), lr_mul=lr_mul, wd_mul=wd_mul)


VARIANTS = {
    "input axis": {"neuron_norm": {"axis": "input"}},
    "floor 0.1": {"neuron_norm": {"eps": 0.1}},
    "rescale add 0.5": {"neuron_norm": {"rescale": "add", "eps": 0.5}},
    "no rescale": {"neuron_norm": {"rescale": None}},
    "decay outside": {"decay": {"inside_scale": False}},
    "decay everywhere": {"decay": {"cautious": False}},
    "rate twice outside": {"decay": {"inside_scale": False, "rate_power": 2}},
    "eps max 3": {"polar": {"eps_rule": "max", "eps": 3.0}},
    "norm scale 1.1": {"polar": {"norm_scale": 1.1}},
    "bias corrected": {"momentum": {"rule": "bias_corrected", "nesterov": False}},
}


@pytest.mark.parametrize("shape_scale", ["rms", "spectral"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_field_of_a_recipe_counts(variant, shape_scale):
    recipe = dataclasses.replace(RECIPES["normuon"], shape_scale=shape_scale)
    for stage, fields in VARIANTS[variant].items():
        changed = dataclasses.replace(getattr(recipe, stage), **fields)
        recipe = dataclasses.replace(recipe, **{stage: changed})
    check_against_oracle(recipe, OUT_IN, (4, 7))


def test_keywords_override_the_recipe():
    recipe = RECIPES["normuon"].override(nesterov=False, beta2=0.5, shape_scale="max_dim")
    runs = []
    for keywords in (
        {"recipe": recipe},
        {"nesterov": False, "beta2": 0.5, "shape_scale": "max_dim"},
        {},
    ):
        param = torch.nn.Parameter(torch.ones(3, 5, dtype=torch.float64))
        optimizer = NorMuon([param], lr=0.1, **keywords, **FLOAT64)
        for g in gradients((3, 5)):
            param.grad = torch.tensor(g)
            optimizer.step()
        runs.append(param.detach())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def train(shapes, *, groups=None, dtype=torch.float32, steps=2, **keywords):
    """Parameters and states after training weights of `shapes` on fixed gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    params = [torch.nn.Parameter(draw(shape)) for shape in shapes]
    groups = groups or [list(range(len(shapes)))]
    optimizer = NorMuon(
        [{"params": [params[index] for index in group]} for group in groups],
        lr=0.02,
        weight_decay=0.1,
        **keywords,
    )
    for _ in range(steps):
        for param in params:
            param.grad = draw(param.shape)
        optimizer.step()
    return params, [optimizer.state[param] for param in params]


def test_splits_are_separate_parameters():
    shapes = [(3, 4, 6), (3, 2, 6), (3, 2, 6)]
    fused = torch.nn.Parameter(torch.randn(3, 8, 6, generator=torch.Generator().manual_seed(1)))
    separate = [torch.nn.Parameter(p) for p in fused.detach().clone().split([4, 2, 2], dim=1)]
    assert [tuple(p.shape) for p in separate] == shapes
    keywords = {"lr": 0.1, "weight_decay": 0.2, "compute_dtype": torch.float64}
    split = NorMuon([fused], layout=MatrixLayout(-1, -2, (4, 2, 2)), **keywords)
    apart = NorMuon(separate, layout=OUT_IN, **keywords)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        fused.grad = torch.randn(fused.shape, generator=generator)
        for param, g in zip(separate, fused.grad.split([4, 2, 2], dim=1), strict=True):
            param.grad = g.clone()
        split.step()
        apart.step()
    assert torch.equal(fused.detach(), torch.cat(separate, dim=1).detach())
    moments = [apart.state[param]["second_moment"] for param in separate]
    assert torch.equal(split.state[fused]["second_moment"], torch.cat(moments, dim=1))


SAME_SHAPE = [(6, 10), (3, 6, 10), (10, 6), (6, 10), (2, 2, 6, 10)]


@pytest.mark.parametrize("max_matrices", [1, 2, 3, 1000])
def test_stacking_makes_the_same_update_as_one_by_one(max_matrices):
    each = bytes_per_matrix(6, 10, dtype=torch.float32, compute_dtype=torch.bfloat16)
    params, states = train(SAME_SHAPE, layout=OUT_IN, max_stack_bytes=each * max_matrices)
    groups = [[i] for i in range(5)]
    alone, alone_states = train(SAME_SHAPE, groups=groups, layout=OUT_IN, max_stack_bytes=1)
    for param, other, state, other_state in zip(params, alone, states, alone_states, strict=True):
        assert torch.equal(param, other)
        for key in ("momentum", "second_moment"):
            assert torch.equal(state[key], other_state[key])


def stack_sizes(max_stack_bytes, layout=OUT_IN, shapes=SAME_SHAPE, **keywords):
    seen = []

    def orthogonalizer(stack):
        seen.append(tuple(stack.shape))
        return stack

    train(
        shapes,
        steps=1,
        orthogonalizer=orthogonalizer,
        max_stack_bytes=max_stack_bytes,
        layout=layout,
        **keywords,
    )
    return sorted(seen)


def test_same_shape_matrices_of_all_groups_are_one_stack():
    assert stack_sizes(None) == [(1, 10, 6), (9, 6, 10)]
    assert stack_sizes(None, groups=[[0, 1, 2], [3, 4]]) == [(1, 10, 6), (9, 6, 10)]


def test_stacks_are_cut_to_their_bound():
    each = bytes_per_matrix(6, 10, dtype=torch.float32, compute_dtype=torch.bfloat16)
    assert stack_sizes(4 * each) == [(1, 10, 6), (3, 6, 10), (3, 6, 10), (3, 6, 10)]
    assert stack_sizes(1) == [(1, 6, 10)] * 9 + [(1, 10, 6)]


def test_blocks_of_one_size_share_a_stack():
    layout = MatrixLayout(-1, -2, (4, 2, 2))
    assert stack_sizes(None, layout=layout, shapes=[(8, 6)]) == [(1, 4, 6), (2, 2, 6)]


def test_orthogonalizer_must_keep_the_shape():
    with pytest.raises(ValueError, match=r"orthogonalizer returned shape \(1, 10, 6\)"):
        train([(6, 10)], orthogonalizer=lambda stack: stack.mT)


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_arrays_and_statistics_come_back_from_their_stack(data):
    rank = data.draw(st.integers(2, 5))
    axes = data.draw(st.permutations(range(rank)))
    first = data.draw(st.integers(1, rank - 1))
    second = data.draw(st.integers(first + 1, rank))
    output, reduction = tuple(axes[:first]), tuple(axes[first:second])
    shape = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    outputs = int(np.prod([shape[axis] for axis in output]))
    splits = (1, outputs - 1) if outputs > 1 else None
    view = MatrixLayout(reduction, output, splits).on(shape)
    array = torch.arange(int(np.prod(shape))).reshape(shape)
    assert torch.equal(from_stack(to_stack(array, view), view), array)
    assert torch.equal(from_blocks(to_blocks(array, view), view), array)
    statistic = array.amax(reduction, keepdim=True)
    reduced = to_stack(statistic, view)
    assert reduced.numel() == statistic.numel()
    assert torch.equal(from_stack(reduced, view), statistic)
