"""The reader of traces translates every hyperparameter of an original, or refuses the file."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from normuon_core import POLYNOMIALS, RECIPES, MatrixLayout, Recipe
from parity_tests import oracle
from parity_tests.compare import infinity_distance
from parity_tests.jax_driver import run_jax
from parity_tests.oracle_driver import run_oracle
from parity_tests.torch_driver import run_torch
from parity_tests.traces import GOLDEN, find_traces, load_trace

STEPS = 3
OUT_IN, IN_OUT = MatrixLayout(-1, -2), MatrixLayout(0, 1)
RATES = {"lr": np.array([0.02, 0.015, 0.01]), "mu": np.array([0.9, 0.92, 0.95])}

Rule = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""The weights (STEPS + 1, *shape) from the first of them and the gradients."""


def record(path, dialect: str, hyperparameters: dict, rule: Rule, *, shape=(7, 5), size=1.0, **of):
    """Writes a trace of one weight; `of` goes into the weight's metadata."""
    random = np.random.default_rng(3)
    start, grads = random.standard_normal(shape), size * random.standard_normal((STEPS, *shape))
    params = rule(start, grads)
    arrays = {f"param/w/{t}": params[t] for t in range(STEPS + 1)}
    for t in range(1, STEPS + 1):
        arrays[f"grad/w/{t}"] = grads[t - 1]
        arrays |= {f"{name}/{t}": values[t - 1] for name, values in RATES.items()}
    meta = {
        "T": STEPS,
        "dialect": dialect,
        "hyperparameters": hyperparameters,
        "weights": {"w": {"shape": shape, **of}},
    }
    np.savez(path, meta=json.dumps(meta), **arrays)
    return path


def by_oracle(recipe: Recipe, layout: MatrixLayout, weight_decay: float, lr_mul=1.0) -> Rule:
    def rule(start, grads):
        params, state = [start], oracle.WeightState()
        for t in range(STEPS):
            step = dict(lr=RATES["lr"][t], mu=RATES["mu"][t], weight_decay=weight_decay)
            params.append(
                oracle.step_weight(
                    recipe, layout, params[-1], grads[t], state, lr_mul=lr_mul, **step
                )
            )
        return np.stack(params)

    return rule


def distance(run, path, read: Callable[[Any], Any] = lambda trace: trace) -> float:
    trace = load_trace(path)
    trace = read(trace)
    (weight,) = trace.weights
    return infinity_distance(
        np.diff(run(trace)["w"].params, axis=0), np.diff(weight.params, axis=0)
    )


def polar(name: str, **fields: Any) -> Recipe:
    return replace(RECIPES[name], polar=replace(RECIPES[name].polar, **fields))


NS5 = POLYNOMIALS["newton_schulz"][0]
OTHER_TRIPLE = (3.0, -3.2, 1.2)
TWO = ((3.0, -3.2, 1.2), (1.5, -0.5, 0.0))

# A dialect, its hyperparameters by the original's names, and the recipe that they make.
VARIANTS: dict[str, tuple[str, dict[str, Any], Recipe]] = {
    "moonlight, six steps": (
        "moonlight",
        dict(wd=0.2, nesterov=False, ns_steps=6),
        replace(
            polar("moonlight", coefficients=(NS5,) * 6),
            momentum=replace(RECIPES["moonlight"].momentum, nesterov=False),
        ),
    ),
    "2024-10, three steps": (
        "muon_2024_10",
        dict(backend="newtonschulz5", backend_steps=3, nesterov=True),
        polar("muon_2024_10", coefficients=(NS5,) * 3),
    ),
    "2024-10, steps and eps": (
        "muon_2024_10",
        dict(steps=6, eps=0.5),
        polar("muon_2024_10", coefficients=(NS5,) * 6, eps=0.5),
    ),
    "Keller Jordan, six steps": (
        "muon_keller",
        dict(weight_decay=0.1, ns_steps=6),
        polar("muon_keller", coefficients=(NS5,) * 6),
    ),
    "dion, epsilon": (
        "dion_muon",
        dict(epsilon=0.5, adjust_lr=None, cautious_wd=True, nesterov=True, weight_decay=0.3),
        replace(
            polar("dion_muon", eps=0.5),
            shape_scale="none",
            decay=replace(RECIPES["dion_muon"].decay, cautious=True),
            momentum=replace(RECIPES["dion_muon"].momentum, nesterov=True),
        ),
    ),
    # The optimizer's epsilon and its AdamW's betas are not the second moment's.
    "dion's NorMuon": (
        "dion_normuon",
        dict(epsilon=0.5, muon_beta2=0.7, beta1=0.1, beta2=0.2, flatten=False),
        replace(
            polar("dion_normuon", eps=0.5),
            neuron_norm=replace(RECIPES["dion_normuon"].neuron_norm, beta2=0.7),
        ),
    ),
    "official, beta2": (
        "normuon_official",
        dict(beta2=0.6, weight_decay=0.2),
        replace(
            RECIPES["normuon_official"],
            neuron_norm=replace(RECIPES["normuon_official"].neuron_norm, beta2=0.6),
        ),
    ),
    "torch, one polynomial a step": (
        "torch_muon",
        dict(ns_coefficients=OTHER_TRIPLE, ns_steps=4, eps=9.0, adjust_lr_fn=None),
        polar("torch_muon", coefficients=(OTHER_TRIPLE,) * 4, eps=9.0),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.usefixtures("x64")
def test_a_variant_recorded_with_the_oracle_is_reproduced(tmp_path, name):
    """Largest distance: 2.4e-14."""
    dialect, hyper, recipe = VARIANTS[name]
    decay = hyper.get("weight_decay", hyper.get("wd", 0.0))
    path = record(tmp_path / "variant.npz", dialect, hyper, by_oracle(recipe, OUT_IN, decay))
    for run in (run_oracle, run_torch, run_jax):
        assert distance(run, path) <= 1e-11, run
    assert distance(run_oracle, path, with_recipe(RECIPES[dialect])) > 1e-2


def with_recipe(recipe: Recipe):
    """The trace as a reader would see it that ignores hyperparameters which it does not know."""
    return lambda trace: replace(
        trace, weights=tuple(replace(weight, recipe=recipe) for weight in trace.weights)
    )


@pytest.mark.usefixtures("x64")
def test_a_flattened_weight_is_one_matrix(tmp_path):
    shape, flat = (6, 2, 3), RECIPES["dion_muon"]

    def rule(start, grads):
        made = by_oracle(flat, OUT_IN, 0.0)(start.reshape(6, 6), grads.reshape(STEPS, 6, 6))
        return made.reshape(STEPS + 1, *shape)

    path = record(tmp_path / "flat.npz", "dion_muon", {"flatten": True}, rule, shape=shape)
    assert distance(run_oracle, path) <= 1e-11
    path = record(tmp_path / "batch.npz", "dion_muon", {"flatten": False}, rule, shape=shape)
    assert distance(run_oracle, path) > 1e-2


TORCH: dict[str, dict[str, Any]] = {
    "six steps": dict(ns_steps=6, eps=1e-7),
    "eps": dict(ns_steps=5, eps=9.0),
    "all": dict(
        ns_steps=4,
        eps=0.5,
        ns_coefficients=OTHER_TRIPLE,
        adjust_lr_fn="match_rms_adamw",
        nesterov=False,
        weight_decay=0.3,
    ),
}


@pytest.mark.parametrize("hyper", TORCH.values(), ids=TORCH.keys())
@pytest.mark.usefixtures("x64")
def test_a_variant_recorded_with_torch_is_reproduced(tmp_path, monkeypatch, hyper):
    """Largest distance: 2.5e-14."""
    # PyTorch's Muon iterates in bfloat16 whatever it is given; its in-place division needs a copy.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())

    def rule(start, grads):
        param = torch.nn.Parameter(torch.tensor(start))
        optimizer = torch.optim.Muon([param], lr=0.1, **{"weight_decay": 0.0, **hyper})
        params = [start]
        for t in range(STEPS):
            (group,) = optimizer.param_groups
            group.update(lr=RATES["lr"][t], momentum=RATES["mu"][t])
            param.grad = torch.tensor(grads[t])
            optimizer.step()
            params.append(param.detach().numpy().copy())
        return np.stack(params)

    path = record(tmp_path / "torch.npz", "torch_muon", hyper, rule)
    for run in (run_oracle, run_torch, run_jax):
        assert distance(run, path) <= 1e-11, run
    assert distance(run_oracle, path, with_recipe(RECIPES["torch_muon"])) > 1e-2


OPTAX: dict[str, dict[str, Any]] = {
    "six steps": dict(ns_steps=6, eps=1e-8),
    "eps": dict(eps=0.5, nesterov=False),
    "one polynomial a step": dict(ns_coeffs=TWO, ns_steps=5, weight_decay=0.3),
    "AOL": dict(preconditioning="aol", weight_decay=0.3),
    "preset": dict(ns_coeffs="dion", consistent_rms=0.7, weight_decay=0.3),
}


@pytest.mark.parametrize("hyper", OPTAX.values(), ids=OPTAX.keys())
@pytest.mark.usefixtures("x64")
def test_a_variant_recorded_with_optax_is_reproduced(tmp_path, hyper):
    """Largest distance: 8.3e-15."""

    def rule(start, grads):
        @jax.jit
        def step(params, state, gradient, rate, beta):
            tx = optax.contrib.muon(rate, beta=beta, **hyper)
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        params = [jnp.asarray(start)]
        state = optax.contrib.muon(0.1, **hyper).init(params[0])
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for t in range(STEPS):
                rates = RATES["lr"][t], RATES["mu"][t]
                after, state = step(params[-1], state, jnp.asarray(grads[t]), *rates)
                params.append(after)
        return np.stack(params)

    path = record(tmp_path / "optax.npz", "optax_muon", hyper, rule)
    for run in (run_oracle, run_torch, run_jax):
        assert distance(run, path) <= 1e-11, run
    assert distance(run_oracle, path, with_recipe(RECIPES["optax_muon"])) > 1e-2


@pytest.mark.parametrize(
    ("dialect", "hyper", "message"),
    [
        ("moonlight", {"ns_stepz": 6}, "moonlight: no translation for .* 'ns_stepz', .* 6"),
        ("optax_muon", {"preconditioning": "schatten"}, "the preconditionings are frobenius, aol"),
        ("optax_muon", {"ns_coeffs": "aol"}, "ns_coeffs='aol': the presets are standard, dion"),
        ("optax_muon", {"adaptive": True}, "adaptive=True: only False"),
        ("muon_2024_10", {"backend": "svd"}, "backend='svd': only 'newtonschulz5'"),
        ("muon_2024_10", {"nesterov": False}, "nesterov=False: only True .*forgets its momentum"),
        ("dion_muon", {"steps": 6}, "steps=6: the recipe has 5 different polynomials"),
        ("dion_muon", {"adjust_lr": "rms"}, "adjust_lr='rms': the shape rules are 'spectral_norm'"),
        ("dion_normuon", {"flatten": True}, "flatten=True: dion's NorMuon takes its second moment"),
        ("muon_keller", {"beta2": 0.9}, "beta2=0.9: the recipe has no neuron normalization"),
        ("torch_muon", {"adjust_lr_fn": "rms"}, "adjust_lr_fn='rms': the shape rules are"),
        ("soap", {"lr": 0.02}, "a trace of 'soap', which is no recipe here"),
    ],
)
def test_a_hyperparameter_without_a_translation_is_refused_by_name(
    tmp_path, dialect, hyper, message
):
    path = record(
        tmp_path / "strange.npz", dialect, hyper, lambda start, _: np.stack([start] * (STEPS + 1))
    )
    with pytest.raises(ValueError, match=f"strange.npz: .*{message}"):
        load_trace(path)


def test_the_metadata_of_a_weight_are_translated_or_refused(tmp_path):
    path = record(
        tmp_path / "strange.npz",
        "moonlight",
        {},
        lambda start, _: np.stack([start] * (STEPS + 1)),
        transposed=True,
    )
    with pytest.raises(ValueError, match=r"no translation for 'transposed', .*of the weight 'w'"):
        load_trace(path)


def test_every_hyperparameter_of_the_golden_traces_has_a_translation():
    """The recipe's own values are translated too, so that traces with others can be read."""
    names = set()
    for path in find_traces(GOLDEN):
        with np.load(path) as file:
            names |= set(json.loads(str(file["meta"]))["hyperparameters"])
        load_trace(path)
    assert {"ns_steps", "backend_steps", "epsilon", "eps", "adjust_lr", "ns_coeffs"} <= names
