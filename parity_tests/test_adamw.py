"""AdamW and NAdam beside the matrices: JAX, PyTorch and the oracle take the same steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import optax_normuon
from parity_tests import oracle
from parity_tests.compare import infinity_distance
from torch_ref import NorMuon

STEPS = 10
OPTIONS = {
    "adamw": {},
    "nesterov": dict(adam_nesterov=True),
    "eps_root": dict(adam_eps_root=0.1),
    "both": dict(adam_nesterov=True, adam_eps_root=0.1),
    "cautious": dict(adam_cautious=True),
    "every third step": dict(adam_every=3),
    "all": dict(adam_nesterov=True, adam_eps_root=0.1, adam_cautious=True, adam_every=3),
}
RATES = dict(adam_b1=0.8, adam_b2=0.97, adam_eps=1e-6, adam_weight_decay=0.3)


def draws() -> list[np.ndarray]:
    """Gradients of very different sizes; one entry is always zero."""
    random = np.random.default_rng(0)
    sizes = 10.0 ** np.arange(-6, 3)
    return [random.standard_normal(9) * sizes * (np.arange(9) != 4) for _ in range(STEPS)]


START = np.random.default_rng(1).standard_normal(9)


def run_jax(dtype, moment=None, **options) -> np.ndarray:
    tx = optax_normuon.normuon(0.05, **RATES, **options, adam_moment_dtype=moment)
    params = jnp.asarray(START, dtype)
    state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in draws():
        updates, state = update(jnp.asarray(gradient, dtype), state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params)


def run_torch(dtype, moment=None, **options) -> np.ndarray:
    param = torch.nn.Parameter(torch.tensor(START, dtype=dtype))
    keywords = {**RATES, **options, "adam_moment_dtype": moment}
    optimizer = NorMuon([param], lr=0.05, optimizer="adamw", **keywords)
    for gradient in draws():
        param.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    if moment is not None:
        assert optimizer.state[param]["exp_avg"].dtype == moment
    return param.detach().numpy()


def run_oracle(**options) -> np.ndarray:
    params, state = START, oracle.AdamState()
    for gradient in draws():
        params = oracle.adamw(
            params,
            gradient,
            state,
            lr=0.05,
            b1=0.8,
            b2=0.97,
            eps=1e-6,
            weight_decay=0.3,
            **{name.removeprefix("adam_"): value for name, value in options.items()},
        )
    return params


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.usefixtures("x64")
def test_both_frameworks_follow_the_oracle_in_float64(options):
    """Largest distance: 9.2e-17; the bound is the project's for float64."""
    expected = run_oracle(**options)
    for actual in (run_jax(jnp.float64, **options), run_torch(torch.float64, **options)):
        assert infinity_distance(actual, expected) <= 1e-13
    if options:
        assert infinity_distance(run_oracle(), expected) > 1e-3


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_frameworks_agree_in_float32(options):
    """Largest distance: 9.9e-8."""
    mine, theirs = run_jax(jnp.float32, **options), run_torch(torch.float32, **options)
    assert infinity_distance(mine, theirs) <= 4e-7


def test_both_frameworks_round_a_half_precision_first_moment_alike():
    """Largest distance: 4.9e-8; from a float32 moment: 2.1e-4."""
    mine = run_jax(jnp.float32, jnp.bfloat16, adam_nesterov=True)
    theirs = run_torch(torch.float32, torch.bfloat16, adam_nesterov=True)
    assert infinity_distance(mine, theirs) <= 4e-7
    assert infinity_distance(mine, run_jax(jnp.float32, adam_nesterov=True)) > 1e-5


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"adam_moment_dtype": torch.int32}, "adam_moment_dtype=torch.int32 .*floating"),
        ({"adam_every": 0}, "adam_every=0; use a whole number of at least 1"),
        ({"adam_every": 2.0}, "adam_every=2.0; use a whole number of at least 1"),
        ({"adam_eps_root": -1.0}, "adam_eps_root=-1.0; use a finite number of at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(keywords, message):
    with pytest.raises(ValueError, match=message):
        NorMuon([torch.nn.Parameter(torch.ones(3))], lr=0.1, optimizer="adamw", **keywords)
