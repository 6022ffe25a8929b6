"""What programs put around an optimizer: schedulers of momentum, gradient scalers, checkpoints in the
flattened form, files of older versions."""

import copy
import os
import pickle

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_checkpoint
from torch.distributed.checkpoint.state_dict_saver import save as save_checkpoint

from normuon_core import MatrixLayout
from torch_ref import NorMuon
from torch_ref.matrices.state import second_moments

QKV = MatrixLayout(-1, -2, (6, 3, 3))


class Model(torch.nn.Module):
    """A matrix, a fused projection, and what AdamW takes."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.nn.Parameter(torch.randn(shape, generator=generator))

        self.matrix, self.qkv = draw(8, 12), draw(12, 8)
        self.embedding, self.bias = draw(10, 8), draw(12)

    def optimizer(self, **keywords):
        groups = [
            {"params": [self.matrix]},
            {"params": [self.qkv], "layout": QKV},
            {"params": [self.embedding, self.bias], "optimizer": "adamw", "lr": 0.01},
        ]
        return NorMuon(groups, **{"lr": 0.05, "weight_decay": 0.1, **keywords})

    def set_gradients(self, step, factor=1.0):
        generator = torch.Generator().manual_seed(step + 1)
        for param in self.parameters():
            param.grad = factor * torch.randn(param.shape, generator=generator)


def trained(steps=2):
    model = Model()
    optimizer = model.optimizer()
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model, optimizer, steps):
    for step in steps:
        model.set_gradients(step)
        optimizer.step()


def assert_same_run(first, second):
    """Parameters and all state, to the bit."""
    for (name, p), (_, q) in zip(
        first[0].named_parameters(), second[0].named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name
        ours, theirs = first[1].state[p], second[1].state[q]
        assert sorted(ours) == sorted(theirs)
        for key, value in ours.items():
            assert torch.equal(value, theirs[key]), (name, key)
            assert value.dtype == theirs[key].dtype


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone, which flattened state dicts ask for."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
def test_a_distributed_checkpoint_goes_round(alone, tmp_path, flat):
    """AdamW and matrices in one model, one of them split: through a file, and on to the same bits."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    first = trained()
    saved = get_optimizer_state_dict(*first, options=options)
    save_checkpoint({"optimizer": saved}, checkpoint_id=tmp_path / "file")
    model = Model()
    model.load_state_dict(first[0].state_dict())
    second = model, model.optimizer()
    template = get_optimizer_state_dict(*second, options=options)
    model.load_state_dict(first[0].state_dict())
    load_checkpoint({"optimizer": template}, checkpoint_id=tmp_path / "file")
    set_optimizer_state_dict(*second, template, options=options)
    assert_same_run(first, second)
    train(*first, range(2, 4))
    train(*second, range(2, 4))
    assert_same_run(first, second)


def older(saved):
    """A state dict as it was when a split weight's second moments were a list."""
    saved = copy.deepcopy(saved)
    for name, state in saved["state"].items():
        if name in (1, "qkv"):
            state["second_moment"] = [x.clone() for x in state["second_moment"].split((6, 3, 3))]
    for group in saved["param_groups"]:
        del group["orthogonalizer"]
    return saved


def test_a_file_with_a_list_of_second_moments_still_loads():
    first = trained()
    saved = older(first[1].state_dict())
    assert isinstance(saved["state"][1]["second_moment"], list)
    model = Model()
    model.load_state_dict(first[0].state_dict())
    second = model, model.optimizer()
    second[1].load_state_dict(saved)
    assert_same_run(first, second)
    assert len(second_moments(second[1].state[model.qkv])) == 1


def test_a_distributed_checkpoint_with_a_list_loads_through_pytorchs_converter(alone, tmp_path):
    """Its blocks have names of their own, which the names of today's state do not meet."""
    first = trained()
    saved = older(get_optimizer_state_dict(*first))
    assert isinstance(saved["state"]["qkv"]["second_moment"], list)
    save_checkpoint({"optimizer": saved}, checkpoint_id=tmp_path / "distributed")
    dcp_to_torch_save(tmp_path / "distributed", tmp_path / "file")
    model = Model()
    model.load_state_dict(first[0].state_dict())
    second = model, model.optimizer()
    read = torch.load(tmp_path / "file", weights_only=True)["optimizer"]
    set_optimizer_state_dict(*second, read)
    assert_same_run(first, second)


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_model_and_optimizer_are_copied_together(way):
    first = trained()
    second = way(first)
    train(*first, range(2, 4))
    train(*second, range(2, 4))
    assert_same_run(first, second)


def test_a_saved_file_is_read_with_weights_only(tmp_path):
    first = trained()
    path = os.fspath(tmp_path / "optimizer.pt")
    torch.save(first[1].state_dict(), path)
    model = Model()
    model.load_state_dict(first[0].state_dict())
    second = model, model.optimizer()
    second[1].load_state_dict(torch.load(path, weights_only=True))
    assert_same_run(first, second)


def test_step_counters_are_loaded_onto_the_parameters_device():
    """A counter elsewhere could not be captured in a CUDA graph. "meta" stands for another device."""
    param = torch.nn.Parameter(torch.ones(4, 3, device="meta"))
    optimizer = NorMuon([param], lr=0.1)
    saved = optimizer.state_dict()
    saved["state"] = {0: {"step": torch.tensor(3), "momentum": torch.zeros(4, 3)}}
    optimizer.load_state_dict(saved)
    assert {value.device.type for value in optimizer.state[param].values()} == {"meta"}


SCHEDULERS = {
    "OneCycleLR": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.1, total_steps=5, base_momentum=0.7, max_momentum=0.9
    ),
    "CyclicLR": lambda optimizer: torch.optim.lr_scheduler.CyclicLR(
        optimizer, 0.01, 0.1, step_size_up=2, base_momentum=0.7, max_momentum=0.9
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_of_momentum_are_followed(name):
    """As rate and momentum written into the groups by hand; without them the run is another."""
    model, by_hand, constant = Model(), Model(), Model()
    optimizer, plain, untouched = (each.optimizer() for each in (model, by_hand, constant))
    scheduler = SCHEDULERS[name](optimizer)
    seen = []
    for step in range(5):
        seen.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        for group, scheduled in zip(plain.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = scheduled["lr"]
        *matrices, others = plain.param_groups
        for group in matrices:
            group["momentum"] = seen[-1][1]
        if step:
            # As in torch.optim.AdamW, whose first beta these schedulers cycle.
            others["betas"] = (seen[-1][1], others["betas"][1])
        for group, scheduled in zip(untouched.param_groups, optimizer.param_groups, strict=True):
            group["lr"] = scheduled["lr"]
        for each, opt in ((model, optimizer), (by_hand, plain), (constant, untouched)):
            train(each, opt, [step])
        if step < 4:
            scheduler.step()
    assert len({momentum for _, momentum in seen}) > 2
    assert_same_run((model, optimizer), (by_hand, plain))
    assert not torch.equal(model.matrix, constant.matrix)


def test_a_gradient_scaler_skips_overflow_and_is_not_felt_otherwise():
    model, plain = Model(), Model()
    optimizer, unscaled = model.optimizer(), plain.optimizer()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    for step in range(4):
        scale = scaler.get_scale()
        model.set_gradients(step, factor=scale)
        scaler.scale(torch.ones(()))
        if step == 1:
            model.matrix.grad[0, 0] = torch.inf
        before = copy.deepcopy((model, optimizer))
        scaler.step(optimizer)
        scaler.update()
        if step == 1:
            assert scaler.get_scale() == scale / 2
            assert_same_run((model, optimizer), before)
        else:
            train(plain, unscaled, [step])
    assert_same_run((model, optimizer), (plain, unscaled))
