"""State dicts of `torch.optim.Muon`, Keller Jordan's Muon, AdamW and older versions, loaded."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from normuon_core import RECIPES, MatrixLayout, NormSetting, RowEquilibration
from torch_ref import NorMuon

CONVOLUTION = MatrixLayout((1, 2, 3), 0)
SHAPES = [(4, 6), (7, 3)]


def parameters(shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
        for shape in shapes
    ]


def train(params, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        optimizer.step()


def twins(params):
    return [torch.nn.Parameter(param.detach().clone()) for param in params]


def assert_goes_on(params, optimizer, make):
    """The original's run goes on in `make(parameters)` once its state is loaded."""
    train(params, optimizer, range(3))
    others = twins(params)
    ours, fresh = make(others), twins(params)
    ours.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(others, ours, range(3, 7))
    train(fresh, make(fresh), range(3, 7))
    train(params, optimizer, range(3, 7))
    for param, other, unloaded in zip(params, others, fresh, strict=True):
        # Measured: at most 6.7e-16.
        torch.testing.assert_close(other, param, rtol=0, atol=3e-15)
        assert not torch.allclose(unloaded, param, rtol=0, atol=1e-3)


@pytest.fixture
def in_float64(monkeypatch):
    """`torch.optim.Muon` iterates in bfloat16 whatever it is given.

    In a copy: it divides what it iterates on in place, which is its momentum where nothing was cast.
    """
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())


TORCH_MUON = [
    {},
    {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.8},
    {"nesterov": False, "ns_steps": 7, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 3.0},
]


@pytest.mark.parametrize("keywords", TORCH_MUON, ids=str)
def test_a_run_of_torch_muon_goes_on(keywords, in_float64):
    params = parameters()
    theirs = torch.optim.Muon(params, lr=0.05, weight_decay=0.3, **keywords)

    def make(others):
        return NorMuon(
            others, 1.0, recipe="torch_muon", shape_scale="spectral", compute_dtype=torch.float64
        )

    assert_goes_on(params, theirs, make)


class Keller(torch.optim.Optimizer):
    """Keller Jordan's Muon with its auxiliary Adam, by RECIPES' formulas and with his keys."""

    def __init__(self, groups):
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for param in group["params"]:
                update = self.muon if group.get("use_muon", True) else self.adam
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(group["lr"] * update(param.grad, self.state[param], group))

    @staticmethod
    def muon(g, state, group):
        m = state.setdefault("momentum_buffer", torch.zeros_like(g))
        m.lerp_(g, 1 - group["momentum"])
        u = g.lerp(m, group["momentum"]).reshape(len(g), -1)
        x = u / (u.norm() + 1e-7)
        for _ in range(5):
            a = x @ x.mT
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x.reshape(g.shape) * math.sqrt(max(1.0, g.size(-2) / g.size(-1)))

    @staticmethod
    def adam(g, state, group):
        state["step"] = state.get("step", 0) + 1
        m = state.setdefault("exp_avg", torch.zeros_like(g))
        n = state.setdefault("exp_avg_sq", torch.zeros_like(g))
        b1, b2 = group["betas"]
        m.lerp_(g, 1 - b1)
        n.lerp_(g.square(), 1 - b2)
        m_hat, n_hat = m / (1 - b1 ** state["step"]), n / (1 - b2 ** state["step"])
        return m_hat / (n_hat.sqrt() + group["eps"])


def test_a_run_of_keller_jordans_muon_with_its_adam_goes_on():
    params = parameters([(4, 6), (7, 3), (5,), (12, 2, 2, 2)])
    muon = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.2, "use_muon": True}
    adam = {"lr": 3e-3, "betas": (0.8, 0.9), "eps": 1e-8, "weight_decay": 0.1, "use_muon": False}

    def groups(params):
        return [
            {"params": params[:2], **muon},
            {"params": params[2:3], **adam},
            {"params": params[3:], **muon},
        ]

    def make(others):
        *plain, filters = groups(others)
        # He scales a filter by its last two axes, here by 1.
        filters |= {"layout": CONVOLUTION, "lr_mul": 1 / math.sqrt(12 / 8)}
        recipe = {"recipe": "muon_keller", "compute_dtype": torch.float64}
        return NorMuon([*plain, filters], lr=1.0, **recipe)

    assert_goes_on(params, Keller(groups(params)), make)


def test_a_run_of_keller_jordans_muon_alone_goes_on():
    params = parameters()
    theirs = Keller([{"params": params, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.2}])

    def make(others):
        return NorMuon(others, lr=1.0, recipe="muon_keller", compute_dtype=torch.float64)

    assert_goes_on(params, theirs, make)


def test_a_run_of_torch_adamw_goes_on_in_an_adamw_group():
    params = parameters([(5,), (3, 4)])
    theirs = torch.optim.AdamW(params, lr=0.05, betas=(0.8, 0.9), weight_decay=0.2)
    assert_goes_on(params, theirs, lambda others: NorMuon(others, lr=1.0, optimizer="adamw"))


def test_translated_state_has_the_dtypes_of_our_own():
    params = [torch.nn.Parameter(param.detach().bfloat16()) for param in parameters()]
    theirs = torch.optim.Muon(params, lr=0.1)
    train_bfloat16(params, theirs)
    for dtype in (None, torch.float16):
        ours = NorMuon(params, lr=0.1, recipe="torch_muon", momentum_dtype=dtype)
        ours.load_state_dict(theirs.state_dict())
        for param in params:
            momentum = ours.state[param]["momentum"]
            assert momentum.dtype == (dtype or torch.float32)
            buffer = theirs.state[param]["momentum_buffer"]
            torch.testing.assert_close(momentum.bfloat16(), buffer, rtol=0, atol=0)
        train_bfloat16(params, ours)


def train_bfloat16(params, optimizer):
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()


def saved(optimizer_class, params, **keywords):
    optimizer = optimizer_class(params, **keywords)
    train(params, optimizer, range(2))
    return optimizer.state_dict()


MUON = {"recipe": "torch_muon"}
ROWS = replace(RECIPES["torch_muon"], row_equilibration=RowEquilibration())
NORM = replace(RECIPES["torch_muon"], norm_setting=NormSetting())
AOL = replace(
    RECIPES["torch_muon"], polar=replace(RECIPES["torch_muon"].polar, preconditioning="aol")
)


@pytest.mark.parametrize(
    ("theirs", "keywords", "ours", "message"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}, MUON, "has the keys dampening, .* neither"),
        (torch.optim.AdamW, {}, MUON, "is of AdamW, .* has optimizer='normuon'; .*'adamw'"),
        (torch.optim.Muon, {}, {}, "is of torch.optim.Muon, .* give the group recipe='torch_muon'"),
        (torch.optim.Muon, {}, {"recipe": "muon_keller"}, "recipe='torch_muon'"),
        (torch.optim.Muon, {}, {"recipe": ROWS}, "recipe='torch_muon'"),
        (torch.optim.Muon, {}, {"recipe": NORM}, "recipe='torch_muon'"),
        (torch.optim.Muon, {}, {"recipe": AOL}, "recipe='torch_muon'"),
        (torch.optim.Muon, {}, {"optimizer": "adamw"}, "has optimizer='adamw'; .*='normuon'"),
        (
            torch.optim.Muon,
            {},
            {**MUON, "layout": MatrixLayout(0, 1)},
            r"parameter 0, of shape \(4, 6\): torch.optim.Muon took it .*=-1, output_axis=-2\)",
        ),
        (torch.optim.AdamW, {"amsgrad": True}, {"optimizer": "adamw"}, "has amsgrad=True"),
        (
            torch.optim.Adam,
            {"weight_decay": 0.1},
            {"optimizer": "adamw"},
            "weight_decay=0.1 added to the gradient",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused_and_nothing_changes(theirs, keywords, ours, message):
    params = parameters()
    state = saved(theirs, params, **keywords)
    optimizer = NorMuon(twins(params), lr=0.1, **ours)
    groups = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert not optimizer.state
    assert [{**g, "params": 0} for g in groups] == [
        {**g, "params": 0} for g in optimizer.param_groups
    ]


def test_a_convolution_that_keller_jordan_scales_otherwise_is_refused_with_the_multiplier():
    params = parameters([(12, 2, 2, 2)])
    group = {"params": params, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}
    optimizer = NorMuon(twins(params), lr=0.1, recipe="muon_keller", layout=CONVOLUTION)
    with pytest.raises(ValueError, match=r"by 1, this recipe by 1\.22474; .* lr_mul=0\.8164"):
        optimizer.load_state_dict(saved(lambda params: Keller([group]), params))


def test_state_of_other_shapes_or_optimizers_is_refused_by_name():
    params = parameters()
    ours = NorMuon([("wq", params[0]), ("wk", params[1])], lr=0.1)
    train(params, ours, range(1))
    state = ours.state_dict()
    swapped = NorMuon([("wk", params[1]), ("wq", params[0])], lr=0.1)
    with pytest.raises(
        ValueError, match=r"parameter 0 .*shape \(7, 3\).*momentum has shape \(4, 6\)"
    ):
        swapped.load_state_dict(state)
    adamw = saved(torch.optim.AdamW, parameters())
    with pytest.raises(ValueError, match=r"parameter 0 .*state has exp_avg, exp_avg_sq, step"):
        ours.load_state_dict({**state, "state": adamw["state"]})
    with pytest.raises(ValueError, match=r"groups of \[2\] parameters, the optimizer .*\[1, 1\]"):
        NorMuon([{"params": [p]} for p in params], lr=0.1).load_state_dict(state)
    one = NorMuon(params, lr=0.1, optimizer="adamw")
    with pytest.raises(ValueError, match="file has optimizer='normuon', the optimizer has 'adamw'"):
        one.load_state_dict(state)


def test_options_that_a_file_lacks_are_filled_in():
    params = parameters()
    ours = NorMuon([{"params": params[:1]}, {"params": params[1:], "optimizer": "adamw"}], lr=0.1)
    train(params, ours, range(1))
    state = ours.state_dict()
    for group in state["param_groups"]:
        for key in ("max_stack_bytes", "backend", "algorithm"):
            del group[key]
    ours.load_state_dict(state)
    assert [group["backend"] for group in ours.param_groups] == ["auto", "auto"]
    train(params, ours, range(1, 2))


def test_an_older_files_adamw_group_keeps_its_own_decay():
    """There the constructor's keywords stood in the group, and the matrices' decay and momentum."""
    params = parameters([(5,)])
    ours = NorMuon(params, lr=0.1, optimizer="adamw", adam_weight_decay=0.5)
    train(params, ours, range(1))
    state = ours.state_dict()
    (group,) = state["param_groups"]
    del group["betas"], group["eps"]
    older = {"adam_b1": 0.7, "adam_b2": 0.8, "adam_eps": 1e-4, "adam_weight_decay": 0.3}
    group |= {**older, "weight_decay": 7.0, "momentum": 0.95}
    ours.load_state_dict(state)
    (group,) = ours.param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.7, 0.8), 1e-4, 0.3)
    assert "momentum" not in group


def test_an_option_that_nothing_reads_is_refused():
    optimizer = NorMuon(parameters(), lr=0.1)
    state = optimizer.state_dict()
    state["param_groups"][0]["frobnicate"] = 1
    with pytest.raises(ValueError, match="group 0 of the file: nothing reads the key 'frobnicate'"):
        optimizer.load_state_dict(state)
    optimizer.param_groups[0]["frobnicate"] = 0
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["frobnicate"] == 1
