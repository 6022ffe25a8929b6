"""What a parameter group of `torch_ref.NorMuon` may say: unknown keys, AdamW's own, `use_muon`."""

import copy

import pytest
import torch

from torch_ref import NorMuon


def parameter(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))


def train(pairs, *, schedulers=(), change=None, steps=6):
    """Steps (parameter, optimizer) pairs with the same gradients."""
    for step in range(steps):
        for param, optimizer in pairs:
            generator = torch.Generator().manual_seed(step)
            param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64)
            if change is not None:
                change(optimizer.param_groups[0], step)
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def adamw_pair(**keys):
    """A parameter in an AdamW group of ours, and a twin in `torch.optim.AdamW`."""
    ours, theirs = parameter(3, 4), parameter(3, 4)
    keys = {"lr": 0.01, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1, **keys}
    group = {"params": [ours], "optimizer": "adamw", **keys}
    mine = NorMuon([group], lr=9.0, weight_decay=7.0, adam_b1=0.5, adam_eps=1.0)
    return (ours, mine), (theirs, torch.optim.AdamW([theirs], **keys))


def assert_same_run(pair, twin):
    # Measured: at most 9e-16 absolute over all tests here.
    torch.testing.assert_close(pair[0], twin[0], rtol=0, atol=4e-15)


def test_betas_eps_and_weight_decay_of_a_group_are_those_of_torch_adamw():
    pair, twin = adamw_pair()
    train([pair, twin])
    assert_same_run(pair, twin)


CHANGES = {
    "betas": lambda group, step: group.update(betas=(0.5 + 0.05 * step, 0.9)),
    "eps": lambda group, step: group.update(eps=0.1 * step),
    "weight_decay": lambda group, step: group.update(weight_decay=group["weight_decay"] * 2),
}


@pytest.mark.parametrize("key", CHANGES)
def test_changes_of_an_adamw_group_count_at_the_next_step(key):
    pair, twin = adamw_pair()
    constant, _ = adamw_pair()
    train([pair, twin], change=CHANGES[key])
    train([constant])
    assert_same_run(pair, twin)
    assert not torch.allclose(pair[0], constant[0], rtol=0, atol=1e-4)


def test_changes_under_the_constructors_keywords_count_too():
    pair, twin = adamw_pair()
    train([pair], change=lambda group, _: group.update(adam_b1=0.3, adam_weight_decay=0.6))
    train([twin], change=lambda group, _: group.update(betas=(0.3, 0.97), weight_decay=0.6))
    assert_same_run(pair, twin)
    assert not {"adam_b1", "adam_weight_decay"} & {*pair[1].param_groups[0]}


SCHEDULERS = {
    "OneCycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.05, total_steps=8
    ),
    "Cyclic": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
        optimizer, base_lr=0.01, max_lr=0.05, step_size_up=2, base_momentum=0.6
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_cycle_momentum_cycle_the_first_beta_of_adamw_groups(name):
    pair, twin = adamw_pair()
    train([pair, twin], schedulers=[SCHEDULERS[name](each) for _, each in (pair, twin)])
    assert_same_run(pair, twin)
    assert pair[1].param_groups[0]["betas"] != (0.8, 0.97)


def test_the_constructors_weight_decay_is_of_matrices_alone():
    param = parameter(4)
    optimizer = NorMuon(
        [{"params": [param], "optimizer": "adamw"}], lr=0.1, weight_decay=7.0, momentum=0.3
    )
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-10, 0.0)
    assert "momentum" not in group


def test_keller_jordans_groups_are_understood():
    matrix, bias = parameter(4, 6), parameter(4)
    groups = [
        {"params": [matrix], "use_muon": True, "lr": 0.02, "momentum": 0.9, "weight_decay": 0.1},
        {"params": [bias], "use_muon": False, "lr": 3e-4, "betas": (0.8, 0.9), "eps": 1e-8},
    ]
    given = copy.deepcopy(groups)
    optimizer = NorMuon(groups, lr=0.1, recipe="muon_keller")
    assert [group["optimizer"] for group in optimizer.param_groups] == ["normuon", "adamw"]
    assert all("use_muon" not in group for group in optimizer.param_groups)
    assert optimizer.param_groups[1]["betas"] == (0.8, 0.9)
    assert [{*group} for group in groups] == [{*group} for group in given]


def test_groups_of_one_optimizer_make_another():
    optimizer = NorMuon(
        [{"params": [parameter(4, 6)]}, {"params": [parameter(4)], "optimizer": "adamw"}],
        lr=0.1,
        adam_b1=0.7,
    )
    other = NorMuon(optimizer.param_groups, lr=0.2)
    for group, twin in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert {**group, "params": 0} == {**twin, "params": 0}


ADAMW = {"optimizer": "adamw"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight_decy": 0.1}, "group 0: nothing reads the key 'weight_decy'; .*'weight_decay'"),
        ({"recipes": "muon"}, "the key 'recipes'; did you mean 'recipe'"),
        ({"process_group": None}, "nothing reads the key 'process_group'"),
        ({"frobnicate": 1}, "nothing reads the key 'frobnicate'; Options are adam_b1"),
        ({"betas": (0.9, 0.99)}, r"betas=\(0.9, 0.99\) is AdamW's, .*optimizer='adamw'"),
        ({"eps": -1e-8}, "eps=-1e-08; use a finite number"),
        ({**ADAMW, "amsgrad": True}, "nothing reads the key 'amsgrad'"),
        ({**ADAMW, "momentum": 0.9}, r"momentum=0.9 is of matrices; .*betas=\(b1, b2\)"),
        ({**ADAMW, "beta2": 0.9}, r"beta2=0.9 is of matrices; .*betas=\(b1, b2\)"),
        ({**ADAMW, "betas": 0.9}, r"betas=.*give a pair \(b1, b2\)"),
        ({**ADAMW, "betas": (0.9, 1.5)}, "adam_b2=1.5"),
        ({**ADAMW, "eps": -1.0}, "adam_eps=-1.0"),
        ({**ADAMW, "weight_decay": -1.0}, "weight_decay=-1.0"),
        (
            {**ADAMW, "weight_decay": 0.1, "adam_weight_decay": 0.2},
            "adam_weight_decay=0.2 and weight_decay=0.1 contradict",
        ),
        ({**ADAMW, "betas": (0.9, 0.99), "adam_b2": 0.9}, "adam_b2=0.9 and betas=.* contradict"),
        ({**ADAMW, "use_muon": True}, "use_muon=True and optimizer='adamw' contradict"),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_what_a_group_cannot_mean_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        NorMuon([{"params": [parameter(4, 6)], **keys}], lr=0.1)


def test_what_pytorch_keeps_in_groups_is_known():
    notes = dict.fromkeys(
        ["initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"], 0.1
    )
    optimizer = NorMuon([{"params": [parameter(4, 6)], **notes}], lr=0.1)
    assert notes.items() <= optimizer.param_groups[0].items()


def test_both_spellings_of_one_value_agree():
    keys = {"betas": (0.8, 0.9), "adam_b1": 0.8, "weight_decay": 0.1, "adam_weight_decay": 0.1}
    optimizer = NorMuon([{"params": [parameter(4)], **ADAMW, **keys}], lr=0.1)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
