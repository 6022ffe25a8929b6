"""The stage functions of `torch_ref`, each against the float64 oracle's."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from normuon_core import NeuronNorm
from normuon_core.neurons import neurons_on_rows, statistic_shape
from parity_tests import oracle
from torch_ref import (
    add_cautious_weight_decay,
    bias_corrected_momentum,
    heavy_ball_momentum,
    lerp_momentum,
    normalize_neurons,
    scale_by_shape,
)

MOMENTA = {
    "lerp": lerp_momentum,
    "heavy_ball": heavy_ball_momentum,
    "bias_corrected": bias_corrected_momentum,
}


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape), dtype=dtype)


@pytest.mark.parametrize("rule", MOMENTA)
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_follows_the_oracle_under_a_schedule(rule, nesterov):
    buffer, expected = torch.zeros(3, 4, dtype=torch.float64), 0.0
    for step, mu in enumerate((0.9, 0.95, 0.5), start=1):
        g = draw(3, 4, seed=step)
        extra = {"step": step} if rule == "bias_corrected" else {}
        u, buffer = MOMENTA[rule](g, buffer, momentum=mu, nesterov=nesterov, **extra)
        expected, direction = oracle.momentum(rule, expected, g.numpy(), mu, nesterov, step)
        np.testing.assert_allclose(buffer, expected, rtol=1e-14, atol=1e-15)
        np.testing.assert_allclose(u, direction, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("rule", MOMENTA)
def test_momentum_changes_neither_gradient_nor_buffer(rule):
    g, buffer = draw(3, 4), draw(3, 4, seed=1)
    kept = g.clone(), buffer.clone()
    extra = {"step": 1} if rule == "bias_corrected" else {}
    MOMENTA[rule](g, buffer, momentum=0.9, nesterov=True, **extra)
    assert torch.equal(g, kept[0])
    assert torch.equal(buffer, kept[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_momentum_of_a_half_precision_gradient_is_float32(dtype):
    g = draw(3, 4, dtype=dtype)
    u, m = lerp_momentum(g, torch.zeros(3, 4), momentum=0.95, nesterov=True)
    lifted = lerp_momentum(g.float(), torch.zeros(3, 4), momentum=0.95, nesterov=True)
    assert u.dtype == m.dtype == torch.float32
    assert torch.equal(u, lifted[0])


def test_one_minus_mu_is_taken_in_the_working_dtype():
    one = torch.ones(1, 1)
    _, m = lerp_momentum(one, torch.zeros(1, 1), momentum=0.95, nesterov=False)
    assert m.item() == np.float32(1) - np.float32(0.95)
    assert m.item() != np.float32(1 - 0.95)


RULES = [
    NeuronNorm(axis=axis, eps_rule=eps_rule, rescale=rescale, eps=eps)
    for axis, eps_rule, rescale, eps in itertools.product(
        ("output", "input", "longer"), ("max", "add"), ("max", "add", None), (1e-10, 1e-2)
    )
]


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
@pytest.mark.parametrize("output_is_rows", [True, False])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.axis}-{r.eps_rule}-{r.rescale}-{r.eps}")
def test_neuron_norm_follows_the_oracle_on_either_orientation(rule, shape, output_is_rows):
    size = statistic_shape(rule.axis, (1, *shape), output_is_rows=output_is_rows)
    s, expected = torch.zeros(size, dtype=torch.float64), 0.0
    for step in range(2):
        v = draw(1, *shape, seed=step)
        v[:, 1], v[..., 2] = 0.0, 0.0
        y, s = normalize_neurons(v, s, **vars(rule), output_is_rows=output_is_rows)
        matrix = v[0].numpy() if output_is_rows else v[0].numpy().T
        longer = matrix.shape[0] >= matrix.shape[1]
        expected, wanted = oracle.normalize_neurons(matrix, expected, rule, longer)
        found = y[0].numpy() if output_is_rows else y[0].numpy().T
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(s.numpy().ravel(), expected.ravel(), rtol=1e-13)


def test_a_tie_of_the_sides_counts_as_output():
    assert neurons_on_rows("longer", 5, 5, output_is_rows=True)
    assert not neurons_on_rows("longer", 5, 5, output_is_rows=False)
    assert neurons_on_rows("longer", 6, 5, output_is_rows=False)


def test_neuron_norm_keeps_each_matrix_norm_of_a_batch():
    v = draw(3, 4, 8) * torch.tensor([1.0, 1e-3, 1e3]).reshape(3, 1, 1)
    y, _ = normalize_neurons(v, torch.zeros(3, 4, 1, dtype=torch.float64))
    norms = [torch.linalg.matrix_norm(x) for x in (v, y)]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)


def test_neuron_norm_rounds_once_from_float32_to_the_compute_dtype():
    v, s = draw(2, 16, 32, dtype=torch.bfloat16), torch.rand(2, 16, 1)
    y, new = normalize_neurons(v, s)
    wanted, expected = normalize_neurons(v.float(), s)
    assert (y.dtype, new.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(new, expected)
    assert torch.equal(y, wanted.bfloat16())


def test_cautious_decay_takes_zero_products_and_skips_negative_ones():
    update = torch.tensor([[1.0, -1.0, 0.0, 1.0]])
    param = torch.tensor([[2.0, 2.0, 2.0, 0.0]])
    result = add_cautious_weight_decay(update, param, weight_decay=0.5)
    assert result.tolist() == [[2.0, -1.0, 1.0, 1.0]]
    plain = add_cautious_weight_decay(update, param, weight_decay=0.5, cautious=False)
    assert plain.tolist() == [[2.0, 0.0, 1.0, 1.0]]
    turned = add_cautious_weight_decay(update, param, weight_decay=0.5, direction=-update)
    assert turned.tolist() == [[1.0, 0.0, 1.0, 1.0]]


def test_decay_multiplier_acts_on_its_own_matrix():
    update, param = torch.zeros(2, 1, 1), torch.ones(2, 1, 1)
    multiplier = torch.tensor([1.0, 4.0]).reshape(2, 1, 1)
    result = add_cautious_weight_decay(update, param, weight_decay=0.5, wd_mul=multiplier)
    assert result.flatten().tolist() == [0.5, 2.0]


@pytest.mark.parametrize("output_is_rows", [True, False])
@pytest.mark.parametrize(
    "rule", ["original", "match_rms_adamw", "spectral", "max_dim", "rms", "none"]
)
def test_shape_scale_follows_the_oracle_on_either_orientation(rule, output_is_rows):
    for shape in ((4, 9), (9, 4)):
        v = draw(1, *shape)
        k = oracle.shape_scale(rule, v[0].numpy() if output_is_rows else v[0].numpy().T)
        scaled = scale_by_shape(v, rule=rule, output_is_rows=output_is_rows, lr_mul=3.0)
        np.testing.assert_allclose(scaled, 3.0 * k * v.numpy(), rtol=1e-13)


def test_rms_rule_leaves_a_zero_update_zero():
    assert not scale_by_shape(torch.zeros(1, 2, 3), rule="rms").any()


def test_record_fields_are_the_keywords_of_their_stage():
    names = {field.name for field in dataclasses.fields(NeuronNorm)}
    assert names <= set(normalize_neurons.__kwdefaults__)
    assert NeuronNorm() == NeuronNorm(
        **{name: normalize_neurons.__kwdefaults__[name] for name in names}
    )
