"""The example's optimizers: names, presets, schedules, and which rates train anything at all."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.errors import BadInput
from examples.gpt import GPTConfig, first_parameters
from examples.optimizers import NAMES, OPTAX_MUON, OptimizerConfig, is_matrix, make_optimizer
from examples.presets import DPO, PRETRAIN, SFT, with_preset
from examples.schedules import momentum_ramp, warm_stay_decay
from normuon_core.shape_rules import shape_factor
from optax_normuon import RECIPES
from parity_tests.covering import covering

MODEL = GPTConfig(width=32, depth=1, heads=2, context=16, vocabulary=64)


@pytest.fixture(scope="module")
def params():
    return first_parameters(MODEL, 0)


@pytest.fixture(scope="module")
def gradients(params):
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return jax.tree.map(lambda leaf: 1e-3 * jax.random.normal(next(keys), leaf.shape), params)


def update_of(config, params, gradients, *, steps=3):
    """The update of the last of some steps at the full rate."""
    config = dataclasses.replace(config, warmup=0.0, decay=0.0)
    with jax.numpy_dtype_promotion("standard"):
        tx = make_optimizer(config, 100).tx
        state, update = tx.init(params), jax.jit(tx.update)
        for _ in range(steps):
            updates, state = update(gradients, state, params)
    return updates


def rms(x):
    return float(jnp.sqrt(jnp.square(x).mean()))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in RECIPES or n in covering()])
def test_every_name_trains_every_parameter_by_an_update_of_like_size(name, params, gradients):
    config = with_preset(OptimizerConfig(name), PRETRAIN, width=MODEL.width)
    updates = update_of(config, params, gradients)
    sizes = {path: rms(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(updates)[0]}
    assert all(size > 0 for size in sizes.values())
    if name != "adamw":
        square = [size for path, size in sizes.items() if is_matrix(path) and "query" in str(path)]
        own = PRETRAIN["normuon" if name in RECIPES and RECIPES[name].neuron_norm else "muon"]
        expected = own.learning_rate / np.sqrt(MODEL.width)
        assert expected / 1.6 < square[0] < 1.6 * expected


def test_optax_s_muon_has_the_same_matrices_and_the_update_of_its_recipe(params, gradients):
    """Its AdamW differs, for it looks ahead too (Nesterov): by 8 % of an update after three steps."""
    ours, theirs = (
        update_of(with_preset(OptimizerConfig(name), PRETRAIN, width=32), params, gradients)
        for name in ("optax_muon", OPTAX_MUON)
    )
    pairs = zip(jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True)
    for (path, mine), other in pairs:
        difference = rms(mine - other) / rms(mine)
        if is_matrix(path):
            assert difference < 1e-3
        else:
            assert 0.07 < difference < 0.09


@pytest.mark.parametrize("presets", [PRETRAIN, SFT, DPO])
def test_presets_leave_given_rates_alone(presets):
    told = OptimizerConfig("muon", learning_rate=0.5)
    found = with_preset(told, presets, width=32)
    assert found.learning_rate == 0.5
    assert found.adam_learning_rate == presets["muon"].adam_learning_rate


def test_a_recipe_of_another_scale_has_a_rate_for_updates_of_one_size():
    found = with_preset(OptimizerConfig("moonlight"), PRETRAIN, width=64)
    factor = shape_factor("match_rms_adamw", 64, 64)
    assert found.learning_rate == pytest.approx(PRETRAIN["muon"].learning_rate / factor)


# MiniMind's suggested rates of the AdamW beside Muon, and the sizes of its updates, on weights of the
# size that a trained model has.
MINIMIND = {"sft": 5e-7, "dpo": 1e-8}


@pytest.mark.parametrize("phase", MINIMIND)
def test_minimind_s_adamw_rates_train_nothing(phase):
    """In bfloat16 one weight of a hundred moves at most, and a thousand float32 steps in one direction
    move it by 3 % of its size at most; ours move it by several times its size."""
    weights = 0.02 * jax.random.normal(jax.random.key(0), (256, 64))
    gradients = jax.random.normal(jax.random.key(1), weights.shape)
    steps = 1000

    def moved(rate):
        """(share of bfloat16 weights that a step changes, the most that a run can move a weight, in
        root mean squares of the weights)."""
        tx = optax.adamw(rate, b2=0.95, eps=1e-10, weight_decay=0.0)
        with jax.numpy_dtype_promotion("standard"):
            updates, _ = tx.update(gradients, tx.init(weights), weights)
        half = weights.astype(jnp.bfloat16)
        after = (half.astype(jnp.float32) + updates).astype(jnp.bfloat16)
        return float((after != half).mean()), steps * rms(updates) / rms(weights)

    share, distance = moved(MINIMIND[phase])
    ours = {"sft": SFT, "dpo": DPO}[phase]["muon"].adam_learning_rate
    our_share, our_distance = moved(ours)
    assert share < 0.012
    assert distance < 0.03
    assert our_share > 0.5
    assert our_distance > 4.0


def test_the_learning_rate_warms_up_stays_and_decays_to_zero():
    rate = warm_stay_decay(2.0, 100, warmup=0.05, decay=0.6)
    values = np.asarray(jax.vmap(rate)(jnp.arange(101))).tolist()
    assert values[0] == pytest.approx(2.0 / 5)
    assert values[4:40] == pytest.approx([2.0] * 36)
    assert values[99] == pytest.approx(2.0 / 60, rel=1e-4)
    assert values[100] == 0.0


def test_momentum_rises_and_falls_again():
    momentum = momentum_ramp(0.85, 0.95, 100, warmup=20, cooldown=10)
    values = np.asarray(jax.vmap(momentum)(jnp.arange(101))).tolist()
    assert values[0] == pytest.approx(0.85)
    assert values[10] == pytest.approx(0.90)
    assert values[20:91] == pytest.approx([0.95] * 71)
    assert values[100] == pytest.approx(0.85)


def test_momentum_s_schedule_reaches_the_optimizer(params, gradients):
    config = with_preset(OptimizerConfig("muon"), PRETRAIN, width=32)
    varied = jax.tree.map(lambda leaf: leaf[::-1], gradients)

    def last(config):
        with jax.numpy_dtype_promotion("standard"):
            tx = make_optimizer(config, 100).tx
            state = tx.init(params)
            for each in (gradients, varied, gradients):
                updates, state = jax.jit(tx.update)(each, state, params)
        return updates["blocks"][0]["mlp"]["up"]["kernel"]

    constant = last(config)
    ramped = last(dataclasses.replace(config, momentum_warmup=50))
    assert float(jnp.abs(constant - ramped).max()) > 1e-4
    with pytest.raises(
        BadInput, match="momentum_warmup=60 and momentum_cooldown=50 take more than"
    ):
        last(dataclasses.replace(config, momentum_warmup=60, momentum_cooldown=50))
    with pytest.raises(BadInput, match="takes no schedule of its momentum"):
        last(dataclasses.replace(config, optimizer="adamw", momentum_warmup=50))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"optimizer": "normun"}, "did you mean 'normuon'"),
        ({"warmup": 0.6, "decay": 0.6}, "warmup=0.6 and decay=0.6"),
        ({"accumulation": 0}, "accumulation=0"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, said):
    with pytest.raises(BadInput, match=said):
        OptimizerConfig(**settings)
