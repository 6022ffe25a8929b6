"""The study of spheres: its arms' optimizers, and its plan and report on trainings that are made up."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.gpt import first_parameters
from examples.ngpt import NGPTConfig
from studies.lab import Lab, OutOfTime
from studies.lanes import Outcome
from studies.ledger import Ledger
from studies.sphere.arms import (
    DOWNHILL,
    FROZEN,
    GEODESIC,
    NAMES,
    ORDER,
    PROJECTION,
    RETRACTION,
    UPHILL,
    axes,
    optimizers,
)
from studies.sphere.plan import NEVER, RATES, Comparisons
from studies.sphere.report import Report
from studies.sphere.study import SMALL, run_all, with_drift
from studies.training import Task
from studies.tuning import Tuning

BEST = {"Adam": 0.0002, "hyperball (MuonH)": 0.3}
"""Rates of the made up losses; another arm's is 0.02."""


class MadeUp:
    """Lanes whose loss is a parabola of the logarithms of the rates, with a part of the seed's own."""

    count = SMALL.lanes

    def __init__(self, fails_after=math.inf):
        self.batches, self._fails_after = 0, fails_after

    def prepare(self, arms):
        pass

    def run(self, trials):
        self.batches += 1
        if self.batches > self._fails_after:
            raise OutOfTime
        return [Outcome(self._measured(trial), 1.0) for trial in trials]

    def _measured(self, trial):
        off = math.log(trial.value("adam_rate") / 0.005)
        if trial.arm != FROZEN:
            off += abs(math.log(trial.value("rate") / BEST.get(trial.arm, 0.02)))
        seed = np.random.default_rng(trial.seed).normal()
        loss = (
            2 + 0.1 * off**2 + 0.1 * seed + 0.01 * trial.value("every") * (trial.arm == PROJECTION)
        )
        loss += (trial.arm == FROZEN) + 0.5 * (trial.arm == UPHILL)
        drift = 0.3 * (trial.value("every") == NEVER)
        return {
            "loss": np.full(trial.evaluations, loss),
            "drift": np.full(trial.evaluations, drift),
        }


def plan_on(lanes, folder):
    ledger = Ledger(
        folder / "rows.csv",
        setup="made up",
        names=NAMES,
        metrics=("loss", "drift"),
        curves=(),
        every=2,
    )
    lab = Lab(lanes, ledger, say=lambda line: None)
    tuning = Tuning(
        lab,
        {arm: axes(arm) for arm in ORDER},
        seeds=SMALL.tuning_seeds,
        points=SMALL.points,
        evaluations=3,
    )
    return Comparisons(SMALL, lab, tuning)


def test_the_study_tables_what_was_made_up_and_goes_on_where_it_stopped(tmp_path):
    first = MadeUp(fails_after=3)
    with pytest.raises(OutOfTime):
        run_all(plan_on(first, tmp_path))
    assert "| geodesic − projection | not run |" in "\n".join(
        Report(plan_on(MadeUp(), tmp_path)).sections()
    )
    lanes = MadeUp()
    plan = plan_on(lanes, tmp_path)
    run_all(plan)
    again = MadeUp()
    run_all(plan_on(again, tmp_path))
    assert again.batches == 0 < lanes.batches
    report = Report(plan)
    text = "\n".join(report.sections())
    assert "not run" not in text
    assert text.count("| geodesic − projection | +0.0000 ± 0.0000 | no difference seen |") == 2
    assert "| 20 | +0.2000 ± 0.0000 | higher | 0.0e+00 |" in text
    assert "| w cos θ + u sin θ, projected every 7 | +0.5000 ± 0.0000 | higher | 0.0e+00 |" in text
    assert (
        "| w cos θ − u sin θ, never projected | +0.0000 ± 0.0000 | no difference seen | 3.0e-01 |"
        in text
    )
    report.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_sweep_takes_the_published_rates_and_goes_on_until_the_best_is_inside(tmp_path):
    plan = plan_on(MadeUp(), tmp_path)
    for arm in (PROJECTION, "Adam", "hyperball (MuonH)"):
        found = list(plan.sweep(arm))
        assert set(RATES) <= set(found)
        losses = [plan._mean(plan.at_rate(arm, rate)) for rate in found]
        best = losses.index(min(losses))
        assert 0 < best < len(found) - 1
    assert len(plan.swept(PROJECTION)) == len(RATES)
    assert min(plan.swept("Adam")) == pytest.approx(0.001 / 8)


SMALLEST = NGPTConfig(width=16, depth=1, heads=2, context=8, vocabulary=32)
VALUES = {"rate": 0.1, "adam_rate": 0.01, "decay": 0.0, "every": 0.0}


@pytest.fixture(scope="module")
def step():
    params = first_parameters(SMALLEST, 0)
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: rng.standard_normal(p.shape, dtype=np.float32), params)

    @functools.cache
    def step_of(arm):
        def one(params, state, told):
            tx = optimizers()[arm](told, jnp.int32(100), jnp.int32(0))
            change, state = tx.update(
                gradients, tx.init(params) if state is None else state, params
            )
            return optax.apply_updates(params, change), state

        return jax.jit(one)

    @jax.numpy_dtype_promotion("standard")
    def updates(arm, steps=1, **values):
        told = {name: jnp.float32(value) for name, value in {**VALUES, **values}.items()}
        after, state = params, None
        for _ in range(steps):
            after, state = step_of(arm)(after, state, told)
        return after

    return params, updates


def up_kernel(params):
    return np.asarray(params["blocks"][0]["mlp"]["up"]["kernel"], np.float64)


def test_projection_and_geodesic_turn_alike_and_the_published_rule_the_other_way(step):
    """Slices turn by about 0.1, which changes their cosine by 5e-3."""
    params, updates = step
    w = up_kernel(params)
    moved = {arm: up_kernel(updates(arm)) for arm in (PROJECTION, GEODESIC, RETRACTION, UPHILL)}
    for arm in (GEODESIC, RETRACTION):
        np.testing.assert_allclose(
            (w * moved[arm]).sum(0), (w * moved[PROJECTION]).sum(0), atol=4e-3
        )
    down, up = moved[GEODESIC] - w, moved[UPHILL] - w
    assert (down * up).sum() < -0.5 * np.linalg.norm(down) * np.linalg.norm(up)
    downhill = up_kernel(updates(DOWNHILL)) - w
    assert (down * downhill).sum() > 0.5 * np.linalg.norm(down) * np.linalg.norm(downhill)


def test_frozen_matrices_stay_and_the_rest_learns(step):
    params, updates = step
    after = updates(FROZEN)
    np.testing.assert_array_equal(up_kernel(after), up_kernel(params))
    assert np.abs(after["lm_head"]["kernel"] - params["lm_head"]["kernel"]).max() > 1e-3


def test_projection_every_third_step_leaves_the_spheres_between(step):
    _, updates = step
    task = with_drift(Task(*[lambda *_: {}] * 4))
    off = [
        float(task.measure(None, updates(PROJECTION, steps, every=3.0))["drift"])
        for steps in (1, 2, 4)
    ]
    assert max(off[0], off[2]) < 1e-6
    assert off[1] > 1e-3
    assert float(task.measure(None, updates(DOWNHILL, 3, every=NEVER))["drift"]) > 1e-3
