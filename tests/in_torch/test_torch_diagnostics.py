"""Diagnostics in PyTorch are those of JAX, of the same step."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

import optax_normuon
import torch_ref
from normuon_core import MatrixLayout

SHAPES = {"dense": (16, 24), "experts": (3, 40, 16), "qkv": (48, 16), "uneven": (48, 16)}
LAYOUTS = {
    "dense": MatrixLayout(1, 0),
    "experts": MatrixLayout(2, 1),
    "qkv": MatrixLayout(1, 0, output_splits=3),
    "uneven": MatrixLayout(1, 0, output_splits=(12, 24, 12)),
}


def arrays(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("recipe", ["normuon", "muon_2024_10", "optax_muon", "nanochat"])
def test_two_steps_have_the_numbers_of_jax(recipe):
    values = arrays(0)
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    optimizer = torch_ref.NorMuon(
        [
            {"params": [param], "param_names": [name], "layout": LAYOUTS[name]}
            for name, param in params.items()
        ],
        lr=0.1,
        recipe=recipe,
        weight_decay=0.3,
        compute_dtype=torch.float32,
    )
    keywords = dict(recipe=recipe, layout=LAYOUTS, compute_dtype=jnp.float32)
    tx = optax_normuon.normuon(0.1, weight_decay=0.3, **keywords)
    mine = {name: jnp.asarray(value) for name, value in values.items()}
    state = tx.init(mine)
    for step in (1, 2):
        grads = arrays(step)
        for name, param in params.items():
            param.grad = torch.tensor(grads[name])
        grads = {name: jnp.asarray(value) for name, value in grads.items()}
        errors = torch_ref.orthogonality_errors(optimizer)
        expected = optax_normuon.orthogonality_errors(grads, state, mine, **keywords)
        before = torch_ref.matrix_weights(optimizer)
        optimizer.step()
        found = torch_ref.update_diagnostics(optimizer, before)
        updates, state = tx.update(grads, state, mine)
        numbers = optax_normuon.update_diagnostics(updates, mine, layout=LAYOUTS)
        mine = {name: mine[name] + updates[name] for name in mine}
        assert list(found) == list(errors) == list(SHAPES)
        for name in SHAPES:
            np.testing.assert_allclose(errors[name].numpy(), expected[name], rtol=1e-3)
            for one, other in zip(found[name], numbers[name], strict=True):
                # Torch's update is read off the weights, which have rounded it.
                np.testing.assert_allclose(one.numpy(), other, rtol=1e-4, atol=2e-5)


def test_asking_changes_neither_state_nor_weights():
    param = torch.nn.Parameter(torch.tensor(arrays(0)["dense"]))
    optimizer = torch_ref.NorMuon([param], lr=0.1)
    param.grad = torch.tensor(arrays(1)["dense"])
    optimizer.step()
    momentum = optimizer.state[param]["momentum"].clone()
    weight = param.detach().clone()
    assert list(torch_ref.orthogonality_errors(optimizer)) == ["0.0"]
    torch.testing.assert_close(optimizer.state[param]["momentum"], momentum, rtol=0, atol=0)
    torch.testing.assert_close(param.detach(), weight, rtol=0, atol=0)


def test_a_step_of_zero_has_zeros():
    param = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = torch_ref.NorMuon([param], lr=0.1)
    before = torch_ref.matrix_weights(optimizer)
    for number in torch_ref.update_diagnostics(optimizer, before)["0.0"]:
        assert number.tolist() == [0.0]
    assert torch_ref.orthogonality_error(torch.zeros(2, 3, 5)).tolist() == [1.0, 1.0]


def optimizer_of(shapes, **keywords):
    rng = np.random.default_rng(0)

    def drawn(shape):
        return torch.tensor(rng.standard_normal(shape).astype(np.float32))

    groups = []
    for name, shape in shapes.items():
        param = torch.nn.Parameter(drawn(shape))
        param.grad = drawn(shape)
        layout = MatrixLayout(-1, -2)
        groups.append({"params": [param], "param_names": [name], "layout": layout})
    return torch_ref.NorMuon(groups, lr=0.1, compute_dtype=torch.float32, **keywords)


@pytest.mark.parametrize("stacked", [True, False])
def test_matrices_of_one_shape_share_a_stack_as_far_as_memory_goes(stacked):
    shapes = {"a": (16, 24), "experts": (3, 16, 24), "b": (16, 24), "tall": (24, 16)}
    stacks = []

    def remembering(u):
        stacks.append(tuple(u.shape))
        return torch_ref.polar_factor(u, compute_dtype=torch.float32)

    whole = torch_ref.orthogonality_errors(optimizer_of(shapes))
    optimizer = optimizer_of(
        shapes, orthogonalizer=remembering, max_stack_bytes=None if stacked else 1
    )
    errors = torch_ref.orthogonality_errors(optimizer)
    one_by_one = [(1, 16, 24)] * 5 + [(1, 24, 16)]
    assert stacks == ([(5, 16, 24), (1, 24, 16)] if stacked else one_by_one)
    assert list(errors) == list(shapes)
    for name, shape in shapes.items():
        assert errors[name].shape == (shape[0] if len(shape) == 3 else 1,)
        torch.testing.assert_close(errors[name], whole[name], rtol=1e-4, atol=0)


def test_an_orthogonalizer_of_ones_own_is_measured():
    def halved(u):
        return torch_ref.polar_factor(u, compute_dtype=torch.float32) / 2

    errors = torch_ref.orthogonality_errors(optimizer_of({"w": (16, 24)}, orthogonalizer=halved))
    torch.testing.assert_close(errors["w"], torch.tensor([0.75]), rtol=0, atol=0.1)
