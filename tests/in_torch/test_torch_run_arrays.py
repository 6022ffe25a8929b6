"""The state of `torch_ref.NorMuon` as named arrays, and back: over ranks, and from other optimizers."""

import copy
import json

import numpy as np
import pytest
import torch

import parity_tests.test_golden
from normuon_core import MatrixLayout
from normuon_core.moving.format import read_metadata
from parity_tests.compare import infinity_distance
from tests.in_torch import moving_cases as cases
from tests.in_torch.ranks import run_on_ranks
from torch_ref import (
    NorMuon,
    parameters_from_arrays,
    parameters_to_arrays,
    state_from_arrays,
    state_to_arrays,
)

GOLDEN = parity_tests.test_golden.__file__.rpartition("/")[0] + "/golden"
SHAPES = {"up": (6, 4), "down": (4, 6), "bias": (5,)}


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for name, shape in SHAPES.items()
    }


def groups(params, **adamw):
    matrices = [params["up"], params["down"]]
    return [{"params": matrices}, {"params": [params["bias"]], "optimizer": "adamw", **adamw}]


def train(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype)
        optimizer.step()


def run(recipe="normuon", steps=2, **keywords):
    params = parameters()
    optimizer = NorMuon(groups(params), 0.02, recipe=recipe, **keywords)
    train(params, optimizer, range(steps))
    return params, optimizer


def twins(params):
    return {name: torch.nn.Parameter(param.detach().clone()) for name, param in params.items()}


def test_states_are_divided_over_ranks_and_gathered_without_a_change(tmp_path):
    folder = tmp_path / "ranks"
    folder.mkdir()
    for name in cases.DTYPES:
        np.savez(folder / f"{name}.npz", **cases.one_process(lambda array: array, name))
    for unlike, radii in run_on_ranks(2, cases.all_cases, folder):
        assert unlike == {way: [] for way in unlike}
        assert len(unlike) == 4
        # Measured: 2.2e-16, and 0 where the owners have whole matrices.
        assert 0 == radii["process_group"] <= radii["fully_shard"] <= 8.8e-16


def test_what_has_never_been_stepped_has_the_state_that_it_starts_from():
    params, optimizer = run("normuon_h", steps=0)
    arrays = state_to_arrays(optimizer, params.items())
    assert not optimizer.state
    assert arrays["step/up"] == arrays["count"] == 0
    state_from_arrays(optimizer, arrays, params.items())
    train(params, optimizer, range(3))
    whole, _ = run("normuon_h", steps=3)
    assert all(torch.equal(params[name], whole[name]) for name in SHAPES)


REFUSED = [
    ({"recipe": "muon"}, "neuron_norm is .* in the file and none here.*recipe='normuon'"),
    ({"beta2": 0.5}, "beta2=0.95"),
    ({"layout": MatrixLayout(0, 1)}, r"up: .* one of \(6, 4\), and here it is one of \(4, 6\)"),
    (
        {"momentum_dtype": torch.float32},
        "momentum/up: the file has float64, and here it is float32",
    ),
    (
        {"adam_every": 2},
        "bias: .* every is 1 in the file and 2 here.* adam_every=1 .* be changed: the",
    ),
    ({"optimizer": "adamw"}, "up: the file's run stepped it as matrices .* goes to AdamW"),
]


@pytest.mark.parametrize(("keywords", "message"), REFUSED, ids=str)
def test_another_optimizer_is_told_what_it_would_have_to_be_and_is_left_alone(keywords, message):
    params, optimizer = run()
    arrays = state_to_arrays(optimizer, params.items())
    others = twins(params)
    ours = NorMuon(groups(others), 0.02, **keywords)
    train(others, ours, range(1))
    before = copy.deepcopy(ours.state_dict()["state"])
    with pytest.raises(ValueError, match=message):
        state_from_arrays(ours, arrays, others.items())
    after = ours.state_dict()["state"]
    for number, state in before.items():
        assert all(torch.equal(value, after[number][key]) for key, value in state.items())


def test_a_sum_of_gradients_goes_on_and_none_is_made_up():
    whole, _ = run(steps=4, adam_every=3)
    params, optimizer = run(steps=2, adam_every=3)
    arrays = state_to_arrays(optimizer, params.items())
    assert arrays["gradient_sum/bias"].all()
    others = twins(params)
    ours = NorMuon(groups(others), 0.02, adam_every=3)
    state_from_arrays(ours, arrays, others.items())
    train(others, ours, range(2, 4))
    assert all(torch.equal(others[name], whole[name]) for name in SHAPES)
    without = {key: array for key, array in arrays.items() if key != "gradient_sum/bias"}
    with pytest.raises(ValueError, match="bias: the file has .* gradient_sum, .* by adam_every=k"):
        state_from_arrays(ours, without, others.items())


def test_names_are_needed_and_must_be_those_of_the_file():
    params, optimizer = run()
    with pytest.raises(
        ValueError, match=r"parameter 1, of shape \(4, 6\): the named parameters do not"
    ):
        state_to_arrays(optimizer, [("up", params["up"]), ("bias", params["bias"])])
    arrays = state_to_arrays(optimizer, params.items())
    renamed = {"w": params["up"], "down": params["down"], "bias": params["bias"]}
    with pytest.raises(ValueError, match="lacks 'w', which the optimizer steps; the file has 'up'"):
        state_from_arrays(optimizer, arrays, renamed.items())
    with pytest.raises(ValueError, match="lacks 'up'"):
        parameters_from_arrays(arrays, params.items())


def test_adamws_settings_are_compared_as_its_group_has_them():
    params, optimizer = run()
    arrays = state_to_arrays(optimizer, params.items())
    others = twins(params)
    ours = NorMuon(groups(others), 0.02)
    # By the constructor's keyword, as a schedule of one's own may write it.
    ours.param_groups[1]["adam_b2"] = 0.99
    with pytest.raises(ValueError, match="bias: .* b2 is 0.95 in the file and 0.99 here"):
        state_from_arrays(ours, arrays, others.items())
    state_from_arrays(ours, arrays, others.items(), changed=["b2"])
    ours.param_groups[1].update(adam_b2=0.95, adam_cautious=True)
    with pytest.raises(ValueError, match="cautious is False in the file and True here"):
        state_from_arrays(ours, arrays, others.items())


@pytest.fixture
def in_float64(monkeypatch):
    """`torch.optim.Muon` iterates in bfloat16 whatever it is given, in place where nothing is cast."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())


def test_a_run_of_torchs_muon_beside_its_adamw_becomes_arrays_that_go_on(in_float64):
    params = parameters()
    matrices = {name: params[name] for name in ("up", "down")}
    theirs = torch.optim.Muon(list(matrices.values()), lr=0.05, weight_decay=0.3)
    adamw = torch.optim.AdamW([params["bias"]], lr=0.01)

    def step(steps):
        for each in steps:
            train(params, theirs, [each])
            adamw.step()

    step(range(3))
    others = twins(params)
    # The two files as one: groups of both, the second's parameters numbered on.
    first, second = (copy.deepcopy(each.state_dict()) for each in (theirs, adamw))
    second["param_groups"][0]["params"] = [2]
    joined = {
        "param_groups": first["param_groups"] + second["param_groups"],
        "state": {**first["state"], 2: second["state"][0]},
    }
    read = NorMuon(groups(others), 1.0, recipe="torch_muon", compute_dtype=torch.float64)
    read.load_state_dict(joined)
    arrays = state_to_arrays(read, others.items())
    np.testing.assert_array_equal(
        arrays["momentum/up"], theirs.state[params["up"]]["momentum_buffer"].numpy()
    )
    kept = read_metadata(arrays)
    assert kept["up"].settings["momentum"]["rule"] == "lerp"
    assert kept["bias"].settings["b2"] == 0.999
    ours = NorMuon(
        groups(others, lr=0.01, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
        0.05,
        recipe="torch_muon",
        weight_decay=0.3,
        compute_dtype=torch.float64,
    )
    state_from_arrays(ours, arrays, others.items())
    train(others, ours, range(3, 6))
    step(range(3, 6))
    for name in SHAPES:
        # Measured: 2.3e-16.
        torch.testing.assert_close(others[name], params[name], rtol=0, atol=1e-14)


def dion_group(of, algorithm, **keywords):
    """A group as microsoft/dion saves it, with the trace's hyperparameters."""
    return {
        "algorithm": algorithm,
        **{key: of[key] for key in ("lr", "mu", "weight_decay", "epsilon", "nesterov")},
        **{key: of[key] for key in ("cautious_wd", "adjust_lr")},
        **({"muon_beta2": of["muon_beta2"]} if algorithm == "normuon" else {}),
        **dict(beta1=0.9, beta2=0.95, flatten=False, step=1),
        **keywords,
    }


@pytest.mark.parametrize("kind", ["dion_normuon", "dion_muon"])
def test_a_run_of_dions_goes_on_as_its_trace_did(kind):
    """From the state after its first step: the momentum is the first gradient then."""
    with np.load(f"{GOLDEN}/{kind}__a.npz") as file:
        trace = dict(file)
    of = json.loads(str(trace["meta"]))["hyperparameters"]
    layouts = {
        "tall": None,
        "wide": None,
        "heads": MatrixLayout(-1, -2, output_splits=3),
        "stack": MatrixLayout(-1, -2),
    }
    params, saved, own, state = {}, [], [], {}
    for number, (name, layout) in enumerate(layouts.items()):
        params[name] = torch.nn.Parameter(torch.tensor(trace[f"param/{name}/1"]))
        extra = {"num_heads": 3} if name == "heads" else {}
        saved.append({"params": [number], **dion_group(of, kind.removeprefix("dion_"), **extra)})
        own.append({"params": [params[name]], "layout": layout})
        state[number] = {"momentum": torch.tensor(trace[f"grad/{name}/1"])}
        if kind == "dion_normuon":
            state[number]["variance_neuron"] = torch.tensor(trace[f"second/{name}/1"])
    make = {"recipe": kind, "compute_dtype": torch.float64}
    read = NorMuon(own, 1.0, **make)
    read.load_state_dict({"param_groups": saved, "state": state})
    arrays = state_to_arrays(read, params.items())
    assert arrays["count"] == 1
    # What is in the common format goes on in another optimizer, made as the file's groups say.
    ours = NorMuon(
        own,
        of["lr"],
        **{**make, "recipe": read.param_groups[0]["recipe"]},
        weight_decay=of["weight_decay"],
    )
    state_from_arrays(ours, arrays, params.items())
    for t in range(2, 7):
        for name, param in params.items():
            param.grad = torch.tensor(trace[f"grad/{name}/{t}"])
        ours.step()
    for name, param in params.items():
        # Measured: 2e-14.
        assert infinity_distance(param.detach().numpy(), trace[f"param/{name}/6"]) < 1e-11


DION = {"lr": 0.1, "mu": 0.95, "weight_decay": 0.1, "epsilon": 1e-8, "nesterov": False}
DION |= {"cautious_wd": False, "adjust_lr": "spectral_norm", "muon_beta2": 0.95}


@pytest.mark.parametrize(
    ("algorithm", "extra", "keywords", "message"),
    [
        ("normuon", {"split_sizes": [4, 2]}, {"recipe": "dion_normuon"}, "has split_sizes"),
        ("normuon", {}, {"recipe": "normuon"}, "give the group recipe='dion_normuon'"),
        ("muon", {}, {"recipe": "torch_muon"}, "give the group recipe='dion_muon'"),
        ("muon", {"num_heads": 2}, {"recipe": "dion_muon"}, "output_splits=2.* give it the former"),
        ("lion", {}, {"optimizer": "adamw"}, "neither this optimizer's nor those of"),
        ("adamw", {"cautious_wd": True}, {"optimizer": "adamw"}, "has cautious_wd=True"),
    ],
)
def test_what_of_dions_cannot_be_continued_is_refused(algorithm, extra, keywords, message):
    param = parameters()["up"]
    group = {"params": [0], **dion_group(DION, algorithm), **extra}
    with pytest.raises(ValueError, match=message):
        NorMuon([param], 0.1, **keywords).load_state_dict({"param_groups": [group], "state": {}})


def test_moments_of_dions_adamw_are_adamws():
    param = parameters()["bias"]
    group = {"params": [0], **dion_group(DION, "adamw", step=7)}
    moments = {"momentum": torch.full((5,), 2.0), "variance": torch.full((5,), 3.0)}
    optimizer = NorMuon([param], 0.1, optimizer="adamw")
    optimizer.load_state_dict({"param_groups": [group], "state": {0: moments}})
    arrays = state_to_arrays(optimizer, [("bias", param)])
    assert (arrays["exp_avg/bias"] == 2).all()
    assert (arrays["exp_avg_sq/bias"] == 3).all()
    assert arrays["step/bias"] == 7
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.95)
    assert parameters_to_arrays([("bias", param)])["parameter/bias"].dtype == np.float64
