"""The studies' machinery: pairing, lanes, rows, tuning, intervals, crossings."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from studies.crossing import steps_to
from studies.finetune.arms import NAMES, at_size, optimizers
from studies.finetune.data import Sizes, made
from studies.finetune.plan import Plan
from studies.finetune.task import RESULT, _behind, answers, update_size
from studies.intervals import interval
from studies.lab import Lab, OutOfTime
from studies.lanes import Lanes
from studies.ledger import Ledger, Row
from studies.mechanism.measures import singular_spread
from studies.parts.arms import add_randomly_masked_decay
from studies.pretraining import random_windows
from studies.search import Axis, best, is_inside, next_round, values_at
from studies.training import Task, to_zero, training
from studies.trial import Trial
from studies.tuning import FIRST_SEED, Tuning

EVERY, MOST, LANES = 2, 5, 4
DATA = {"target": jnp.asarray([1.0, -2.0, 0.5], jnp.float32)}


def first(data, seed, values):
    del data, values
    return {"w": jax.random.normal(jax.random.key(seed), (3,))}


def batch(data, seed, step):
    key = jax.random.fold_in(jax.random.key(seed), step)
    return data["target"] + 0.1 * jax.random.normal(key, (3,))


def loss(params, batch):
    return jnp.square(params["w"] - batch).sum()


def measure(data, params):
    return {"loss": loss(params, data["target"]), "first": params["w"][0]}


TASK = Task(first, batch, loss, measure)


def sgd(values, steps, seed):
    return optax.sgd(to_zero(values["rate"], steps))


def sign(values, steps, seed):
    return optax.sign_sgd(to_zero(values["rate"], steps))


class Counted(Lanes):
    """Lanes that remember how many trials they were asked for."""

    asked = 0

    def run(self, trials):
        self.asked += len(trials)
        return super().run(trials)


@pytest.fixture
def lab(tmp_path):
    return new_lab(tmp_path)


def new_lab(folder, minutes=None, setup="a quadratic"):
    arms = {
        name: training(TASK, make, every=EVERY, most=MOST)
        for name, make in {"sgd": sgd, "sign": sign}.items()
    }
    ledger = Ledger(
        folder / "rows.csv",
        setup=setup,
        names=("rate",),
        metrics=("loss", "first"),
        curves=("loss",),
        every=EVERY,
    )
    lanes = Counted(TASK, arms, names=("rate",), data=DATA, count=LANES)
    return Lab(lanes, ledger, minutes=minutes, say=lambda line: None)


def trials(arm="sgd", rate=0.1, seeds=range(LANES), evaluations=MOST):
    return [Trial(arm, {"rate": rate}, seed, evaluations) for seed in seeds]


def alone(make, seed, rate, evaluations):
    """The same training step by step, without `vmap`, scan or padding."""
    tx = make({"rate": jnp.float32(rate)}, jnp.int32(evaluations * EVERY), jnp.int32(seed))
    params = first(DATA, seed, {})
    state, losses = tx.init(params), []
    for step in range(evaluations * EVERY):
        grads = jax.grad(loss)(params, batch(DATA, seed, step))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if (step + 1) % EVERY == 0:
            losses.append(float(measure(DATA, params)["loss"]))
    return losses


def test_lanes_equal_single_runs_whatever_their_seed_rate_and_length(lab):
    mixed = [Trial("sgd", {"rate": rate}, seed, 3) for seed, rate in [(0, 0.1), (7, 0.3), (2, 0.1)]]
    for trial, row in zip(mixed, lab.run(mixed, curves=True), strict=True):
        wanted = alone(sgd, trial.seed, trial.values["rate"], 3)
        np.testing.assert_allclose(row.curves["loss"], wanted, rtol=1e-5)
        assert row.final["loss"] == pytest.approx(wanted[-1], rel=1e-5)
    assert lab.run(mixed)[0].final["loss"] != lab.run(mixed)[2].final["loss"]


def test_arms_share_first_weights_and_batches_seed_by_seed(tmp_path):
    """With rate 0 what is measured are the first weights; with a linear loss one step is the batch."""
    lab = new_lab(tmp_path)
    still = [
        [row.final["first"] for row in lab.run(trials(arm, rate=0.0))] for arm in ("sgd", "sign")
    ]
    assert still[0] == still[1]
    assert len(set(still[0])) == LANES
    seen = {}

    def spy(arm):
        def seeing(data, seed, step):
            made = batch(data, seed, step)
            jax.debug.callback(
                lambda s, t, b: seen.setdefault((arm, int(s), int(t)), b.tolist()), seed, step, made
            )
            return made

        return seeing

    for arm, make in {"sgd": sgd, "sign": sign}.items():
        run = training(TASK._replace(batch=spy(arm)), make, every=EVERY, most=1)
        seeds = jnp.arange(2)
        values = {"rate": jnp.asarray([0.1, 0.2], jnp.float32)}
        weights = jax.vmap(first, in_axes=(None, 0, None))(DATA, seeds, {})
        jax.vmap(run, in_axes=(None, 0, 0, None, 0))(DATA, seeds, values, jnp.int32(1), weights)
    jax.effects_barrier()
    for seed in range(2):
        for step in range(EVERY):
            assert seen["sgd", seed, step] == seen["sign", seed, step]
    assert seen["sgd", 0, 0] != seen["sgd", 1, 0] != seen["sgd", 1, 1]


def test_a_rerun_skips_rows_and_another_setup_does_not(tmp_path):
    before = new_lab(tmp_path)
    rows = before.run(trials(seeds=range(3)), curves=True)
    again = new_lab(tmp_path)
    found = again.run(trials(seeds=range(5)))
    assert (before.lanes.asked, again.lanes.asked) == (3, 2)
    assert [row.final for row in found[:3]] == [row.final for row in rows]
    np.testing.assert_array_equal(found[1].curves["loss"], rows[1].curves["loss"])
    assert new_lab(tmp_path, setup="another").ledger.__contains__(trials()[0]) is False


def test_one_trial_that_is_asked_for_twice_is_one_row(lab):
    assert len(lab.run([*trials(seeds=[1]), *trials(seeds=[1])])) == 2
    assert lab.lanes.asked == 1


def test_behind_the_limit_nothing_is_begun_and_what_was_finished_stays(tmp_path):
    lab = new_lab(tmp_path, minutes=0.0)
    with pytest.raises(OutOfTime):
        lab.run(trials())
    assert lab.lanes.asked == 0


def test_a_rate_goes_to_zero_behind_the_last_step():
    rates = [float(to_zero(jnp.float32(2.0), jnp.int32(100))(step)) for step in range(101)]
    assert max(rates) == pytest.approx(2.0)
    assert rates.index(max(rates)) <= 5
    assert rates[-1] == 0.0 < rates[-2]
    np.testing.assert_allclose(np.diff(rates[6:]), np.diff(rates[6:])[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("wanted", "steps"), [(2.5, 15.0), (2.0, 20.0), (1.5, 25.0), (9.0, 10.0), (0.5, None)]
)
def test_steps_to_a_loss_are_interpolated_between_evaluations(wanted, steps):
    assert steps_to([3.0, 2.0, 1.0, 1.2], wanted, every=10) == steps


def test_the_first_of_several_crossings_counts():
    assert steps_to([3.0, 1.0, 3.0, 1.0], 2.0, every=1) == 1.5


def test_an_interval_is_that_of_the_paired_t_test():
    first, second = np.random.default_rng(0).normal(size=(2, 9))
    found = interval(first - second)
    wanted = scipy.stats.ttest_rel(first, second).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(wanted))
    # By hand: mean 2, s = 1, t(0.975, 2) = 4.3027.
    assert interval([1, 2, 3]) == pytest.approx((2.0, 4.3027 / math.sqrt(3)), rel=1e-4)
    assert interval([1, 2, 3]).half > interval([1, 2, 3], 0.5).half
    assert math.isinf(interval([1.0]).half)


AXES = (Axis("rate", 0.01), Axis("decay", 0.1, factor=4.0, floor=-1))


def bowl(lowest):
    return lambda point: sum((a - b) ** 2 for a, b in zip(point, lowest, strict=True))


@pytest.mark.parametrize("lowest", [(0, 0), (6, 2), (-5, -1)])
def test_rounds_widen_the_grid_until_the_best_lies_inside(lowest):
    losses, rounds = {}, 0
    while not losses or not is_inside(AXES, losses):
        points = next_round(AXES, losses, 4)
        assert len(set(points)) == 4
        assert losses.keys().isdisjoint(points)
        losses |= {point: bowl(lowest)(point) for point in points}
        rounds += 1
    assert best(losses) == lowest
    assert (rounds > 2) == (lowest != (0, 0))
    assert min(point[1] for point in losses) >= -1


def test_a_best_at_the_edge_is_not_inside_and_a_floor_is_no_edge():
    tried = {(i, 0): float(i) for i in range(-1, 2)} | {(-1, 1): 5.0, (-1, -1): 5.0}
    assert not is_inside(AXES, tried)
    assert is_inside(AXES, tried | {(-2, 0): 9.0})
    at_floor = {(0, -1): 0.0, (0, 0): 1.0, (1, -1): 1.0, (-1, -1): 1.0}
    assert is_inside(AXES, at_floor)


def test_a_diverged_point_is_never_the_best():
    assert best({(0, 0): math.nan, (1, 0): 3.0}) == (1, 0)


def test_a_floor_stands_for_none():
    assert values_at(AXES, (1, -1)) == {"rate": 0.02, "decay": 0.0}
    assert values_at(AXES, (0, 1)) == {"rate": 0.01, "decay": 0.4}


def test_tuning_gives_arms_equally_many_trials_until_the_best_of_each_is_inside(lab):
    axes = {"sgd": [Axis("rate", 0.001)], "sign": [Axis("rate", 0.2)]}
    tuning = Tuning(lab, axes, seeds=2, points=2, evaluations=MOST)
    rounds = tuning.tune(["sgd", "sign"], at_least=1, at_most=12)
    found = {arm: tuning.so_far(arm) for arm in axes}
    assert found["sgd"].inside
    assert found["sign"].inside
    assert found["sgd"].rounds == found["sign"].rounds == rounds > 3
    assert len(found["sgd"].losses) == len(found["sign"].losses) == 2 * rounds
    assert found["sgd"].values["rate"] > 0.01
    seeds = {row.trial.seed for row in lab.ledger}
    assert seeds == {FIRST_SEED, FIRST_SEED + 1}


def test_a_rerun_tunes_an_arm_no_less_than_one_that_has_had_more_rounds(lab):
    """Its best lies inside already, so that the rounds of a first run are not asked for again."""
    axes = {"sgd": [Axis("rate", 0.001)], "sign": [Axis("rate", 0.2)]}
    tuning = Tuning(lab, axes, seeds=2, points=2, evaluations=MOST)
    rounds = tuning.tune(["sgd"], at_least=1, at_most=12)
    assert tuning.tune(["sgd"], at_least=1, at_most=12) == rounds > 3
    assert tuning.tune(["sgd", "sign"], at_least=1, at_most=12) == rounds
    assert tuning.so_far("sign").rounds == rounds


def test_windows_are_runs_of_the_text():
    windows = random_windows(jax.random.key(0), jnp.arange(50, dtype=jnp.uint8), 64, 8)
    assert windows.shape == (64, 8)
    np.testing.assert_array_equal(np.diff(windows.astype(np.int32)), 1)
    assert (windows[:, 0].min(), windows[:, -1].max()) == (0, 49)


def test_the_random_mask_decays_as_many_entries_as_the_cautious_one_but_others():
    v, p = jax.random.normal(jax.random.key(0), (2, 64, 64)) + 0.3
    tx = add_randomly_masked_decay(jnp.float32(0.5), jnp.int32(3))
    state = tx.init(p)
    first, state = tx.update(v, state, p)
    second, _ = tx.update(v, state, p)
    cautious = jnp.sign(v) * jnp.sign(p) >= 0
    masks = [new != v for new in (first, second)]
    for new, mask in zip((first, second), masks, strict=True):
        np.testing.assert_allclose(new, jnp.where(mask, v + 0.5 * p, v), rtol=1e-6)
        assert float(mask.mean()) == pytest.approx(float(cautious.mean()), abs=0.03)
        assert float((mask == cautious).mean()) < 0.7
    assert (masks[0] != masks[1]).any()


def test_the_spread_of_squared_singular_values_is_that_of_a_decomposition():
    matrix = jax.random.normal(jax.random.key(1), (6, 9)) * jnp.arange(1.0, 7.0)[:, None]
    squares = np.square(np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False))
    wanted = squares.std() / squares.mean()
    for each in (matrix, matrix.T, 1e-9 * matrix):
        assert float(singular_spread(each)) == pytest.approx(wanted, rel=1e-5)
    assert float(singular_spread(jnp.eye(4))) == pytest.approx(0.0, abs=1e-3)


def test_results_of_answers_are_what_stands_behind_the_sign():
    text = b"\x02q 1?\x00\x031 #### 42\x00\x00"
    found = _behind(jnp.asarray([list(text)], jnp.uint8), RESULT)[0]
    assert bytes(np.asarray(list(text), np.uint8)[np.asarray(found)]) == b"42\x00\x00"
    assert not _behind(jnp.asarray([list(b"no sign in here")], jnp.uint8), RESULT).any()


def test_an_answer_is_exact_if_every_byte_of_it_is_the_likeliest(monkeypatch):
    tokens = jnp.asarray([list(b"?#### 42"), list(b"?#### 43")], jnp.uint8)
    weights = jnp.asarray([[0] + [1] * 7] * 2, jnp.uint8)
    said = jnp.asarray([list(b"#### 42"), list(b"#### 42")])
    monkeypatch.setattr(
        "studies.finetune.task.apply_model", lambda *_: 9.0 * jax.nn.one_hot(said, 128)
    )
    found = answers(None, None, tokens, weights)
    assert (float(found["exact"]), float(found["result"])) == (0.5, 0.5)
    found = answers(None, None, tokens, weights.at[1, -1].set(0))
    assert float(found["exact"]) == 1.0


def test_what_is_asked_is_in_none_of_the_texts():
    sizes = Sizes(context=96, prose=3000, train=100, asked=200, windows=1)
    problems = made(sizes)
    assert [len(each) for each in problems[:3]] == [100, 200, 200]
    prompts = [{bytes(c.prompt) for c in each} for each in problems[:3]]
    assert not prompts[0] & prompts[1]
    for prompt in prompts[1] | prompts[2]:
        assert prompt.strip(b"\x00\x02\x03") not in problems.prose


def test_muon_at_a_size_has_updates_of_that_size_and_without_a_scale_has_not():
    params = {"blocks": {"0": {"up": {"kernel": jnp.ones((16, 64), jnp.float32)}}}}
    grads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape), params)

    def size(values):
        values = {name: jnp.float32(values.get(name, 0.0)) for name in NAMES}
        tx = optimizers()["Muon"](values, jnp.int32(10**6), jnp.int32(0))
        # Behind the warmup of the rate.
        state = optax.tree_utils.tree_set(tx.init(params), count=jnp.int32(50_000))
        return float(update_size(tx, grads, state, params)["update_rms"])

    # Newton-Schulz leaves singular values between 0.7 and 1.2.
    assert size(at_size("Muon", 1e-4)) == pytest.approx(1e-4, rel=0.25)
    unscaled = size({**at_size("Muon", 1e-4), "scale": 0})
    assert unscaled == pytest.approx(5 * size(at_size("Muon", 1e-4)) / 8, rel=1e-3)


def test_later_groups_of_the_plan_are_around_the_best_size_of_the_sweep(tmp_path):
    ledger = Ledger(
        tmp_path / "rows.csv", setup="", names=NAMES, metrics=("loss",), curves=(), every=1
    )
    plan = Plan(evaluations=1, seeds=3, coarse_seeds=1)
    groups = plan.groups(ledger)
    best_size = 1e-4
    for _ in range(6):
        trials = next(groups)
        ledger.add([fake(trial, best_size) for trial in trials if trial not in ledger])
    assert plan.best(ledger, "Muon", 1) == best_size
    compared = next(groups)
    assert {trial.seed for trial in compared} == {0, 1, 2}
    assert len(compared) == 2 * 3 * 3
    wanted = [at_size("AdamW", size)["rate"] for size in (10**-4.5, 1e-4, 10**-3.5)]
    assert sorted({trial.value("rate") for trial in compared}) == pytest.approx(wanted, rel=1e-4)


def fake(trial, best_size):
    rms = trial.value("rate") * (0.3 if trial.arm == "AdamW" else 0.2)
    return Row(trial, {"loss": abs(math.log(rms / best_size))}, {}, 1.0, 1, "none", "none")
