"""`identify` names what made a trace, from arrays and shapes alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import normuon_core
from normuon_core import RECIPES, Decay, Hyperball, MatrixLayout, NeuronNorm
from parity_tests.__main__ import app
from parity_tests.compare import infinity_distance
from parity_tests.identification.blind import (
    attempts,
    is_right,
    made_by,
    single_changes,
    start,
    write,
)
from parity_tests.identification.identify import identify
from parity_tests.identification.naming import Nearest, changes_of, keywords
from parity_tests.identification.observed import Fit
from parity_tests.traces import GOLDEN, read_file
from torch_ref import NorMuon
from torch_ref.leaves.groups import group_recipe


def nameless(stem: str, folder):
    """A golden trace without its names, kept moments included."""
    with np.load(GOLDEN / f"{stem}.npz") as file:
        arrays = {key: file[key] for key in file.files if key.split("/")[0] in KEPT}
        meta = json.loads(str(file["meta"]))
    path = folder / "trace.npz"
    np.savez(path, meta=json.dumps({"T": meta["T"], "weights": meta["weights"]}), **arrays)
    return path


KEPT = ("param", "grad", "lr", "mu")


def made(recipe, path, *, in_out=False, weight_decay=0.1):
    random = np.random.default_rng(7)
    trace = replace(start(random, recipe, in_out), weight_decay=weight_decay)
    write(made_by(trace, recipe), path)
    return path


@pytest.mark.parametrize(
    ("stem", "in_out", "expected"),
    [
        ("moonlight__a__sched", False, {"recipe": "moonlight", "weight_decay": 0.1}),
        ("optax_muon__a__sched", True, {"recipe": "optax_muon", "weight_decay": 0.1}),
        ("muon_2024_10__a__sched", False, {"recipe": "muon_2024_10", "weight_decay": 0.0}),
        ("normuon_2025_11__a__sched", False, {"recipe": "normuon_2025_11", "weight_decay": 1.2}),
    ],
)
def test_an_original_is_named_without_its_names(stem, in_out, expected, tmp_path):
    found = identify(nameless(stem, tmp_path))
    assert found.name == stem.split("__")[0]
    assert found.in_out == in_out
    assert found.keywords == expected
    assert found.changes == ()
    assert found.exact
    assert found.difference < 1e-11


def test_a_fused_projection_is_held_to_what_its_layout_allows(tmp_path):
    found = identify(nameless("dion_normuon__a__rms_plain", tmp_path))
    assert found.name == "dion_normuon"
    assert found.keywords["shape_scale"] == "match_rms_adamw"
    assert 1e-9 < found.difference < 1e-6
    assert found.exact


def test_numbers_between_the_published_ones_are_found(tmp_path):
    recipe = RECIPES["normuon_official"].override(beta2=0.937, eps=3e-3)
    found = identify(made(recipe, tmp_path / "trace.npz", weight_decay=0.037))
    assert found.name == "normuon_official"
    assert found.keywords == {
        "recipe": "normuon_official",
        "beta2": 0.937,
        "eps": 0.003,
        "weight_decay": 0.037,
    }
    assert [change.stage for change in found.changes] == ["eps", "beta2"]
    assert found.exact
    assert found.gap > 1e-3


def test_a_stage_of_no_keyword_is_in_the_recipe_and_the_gap_is_its_own(tmp_path):
    known = RECIPES["dion_muon"]
    recipe = replace(known, decay=replace(known.decay, rate_power=2))
    found = identify(made(recipe, tmp_path / "trace.npz", weight_decay=1.2))
    assert str(found.changes[0]) == "decay's power: 1 -> 2"
    assert "rate_power=2" in repr(found.keywords["recipe"])
    assert found.recipe == recipe
    assert found.gap > 1e4 * found.difference


def test_what_is_printed_makes_the_optimizer_of_every_recipe_and_change():
    for name, known in RECIPES.items():
        changed = [recipe for options in single_changes(known).values() for recipe in options]
        for recipe in [known, *changed]:
            near = Nearest(name, changes_of(recipe, name), Fit(recipe, 0.0, weight_decay=0.1))
            optimizer = NorMuon([torch.nn.Parameter(torch.ones(2, 3))], 0.1, **read(keywords(near)))
            group = optimizer.param_groups[0]
            assert replace(group_recipe(group), source="") == replace(recipe, source="")
            assert group["weight_decay"] == 0.1


def read(call):
    """The keywords as somebody has them who copies the printed line."""
    line = ", ".join(f"{name}={value!r}" for name, value in call.items())
    return eval(f"dict({line})", {**vars(normuon_core), "replace": replace})


@pytest.mark.parametrize("seen", [False, True])
def test_what_is_printed_of_a_hyperball_takes_its_steps(seen, tmp_path):
    """The original's trace starts on the sphere, which hides that its radius was given."""
    if seen:
        recipe = replace(RECIPES["muon_h"], hyperball=Hyperball(radius=2.5))
        path = made(recipe, tmp_path / "trace.npz")
    else:
        path = nameless("muon_h__a__radius", tmp_path)
    found = identify(path)
    assert found.name == "muon_h"
    assert found.also == ()
    assert found.recipe.hyperball == Hyperball(radius=2.5 if seen else None)
    arrays, meta = read_file(path)
    params = {
        name: torch.nn.Parameter(torch.tensor(arrays[f"param/{name}/0"]))
        for name in meta["weights"]
    }
    call = read(found.keywords) | {"layout": MatrixLayout(-1, -2), "compute_dtype": torch.float64}
    optimizer = NorMuon(list(params.values()), 0.0, **call)
    for t in range(1, meta["T"] + 1):
        rates = {"lr": float(arrays[f"lr/{t}"]), "momentum": float(arrays[f"mu/{t}"])}
        optimizer.param_groups[0].update(rates)
        for name, param in params.items():
            param.grad = torch.tensor(arrays[f"grad/{name}/{t}"])
        optimizer.step()
    for name, param in params.items():
        # Measured: 6.7e-16.
        assert (
            infinity_distance(param.detach().numpy(), arrays[f"param/{name}/{meta['T']}"]) < 1e-11
        )


def test_a_stranger_is_near_to_something_and_not_exact(tmp_path):
    unknown = RECIPES["muon_keller"].override(coefficients=((3.1, -4.0, 1.7),) * 5)
    found = identify(made(unknown, tmp_path / "trace.npz"))
    assert not found.exact
    assert found.difference > 1e-3
    assert "more than rounding" in str(found)


def test_a_blind_trial_is_named_rightly_and_another_answer_is_wrong():
    ((drawn, found),) = attempts(seed=4, count=1)
    assert is_right(drawn, found), (drawn.name, drawn.stage, str(found))
    assert not is_right(replace(drawn, name="simple_muon"), found)
    assert not is_right(drawn, replace(found, changes=()))


def test_the_first_line_printed_is_the_name(tmp_path):
    result = CliRunner().invoke(app, ["identify", str(nameless("muon_keller__a__sched", tmp_path))])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[0] == "muon_keller"


def test_a_part_of_the_weights_decides_between_equal_records(tmp_path):
    """2025-11 and 2025-12 differ in how attention is stored; without it they are one."""
    path = nameless("normuon_2025_12__a__sched", tmp_path)
    assert identify(path).also == ()
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files if "attn" not in key}
    meta = json.loads(str(arrays.pop("meta")))
    del meta["weights"]["attn"]
    np.savez(path, meta=json.dumps(meta), **arrays)
    found = identify(path)
    assert {found.name, *found.also} == {"normuon_2025_11", "normuon_2025_12"}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        # The second moment averages norms that were set, and is on the side that was not equilibrated.
        ("nanochat", {"neuron_norm": NeuronNorm(beta2=0.995, axis="longer")}),
        # A norm that stays is not linear in the decay.
        ("muon_h", {"decay": Decay(cautious=True, inside_scale=False)}),
    ],
)
def test_a_changed_stage_beside_further_ones_is_found(name, change, tmp_path):
    recipe = replace(RECIPES[name], **change)
    found = identify(made(recipe, tmp_path / "trace.npz"))
    assert found.name == name
    assert found.changes == changes_of(recipe, name)
    assert found.exact
    assert found.keywords["weight_decay"] == 0.1
