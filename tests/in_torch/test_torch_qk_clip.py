"""QK-clip on PyTorch's parameters: modules, remainders, shards and errors."""

import numpy as np
import pytest
import torch
from torch import nn

from normuon_core import HeadLayout
from torch_ref import NorMuon, join_remainder, qk_clip

WEIGHTS = {"*.query.weight": HeadLayout(heads=4, axis=0)}
LOGITS = {"attention": torch.tensor([1.0, 8.0, 2.0, 3.0])}


def model(dtype=torch.float32) -> nn.ModuleDict:
    torch.manual_seed(0)
    layers = {"query": nn.Linear(6, 8, bias=False), "value": nn.Linear(6, 8, bias=False)}
    return nn.ModuleDict({"attention": nn.ModuleDict(layers)}).to(dtype)


def test_only_heads_above_tau_change_and_only_the_weights_that_are_named():
    made, before = model(), model().state_dict()
    qk_clip(made, LOGITS, tau=2.0, weights=WEIGHTS)
    after = made.state_dict()
    assert torch.equal(after["attention.value.weight"], before["attention.value.weight"])
    ratio = (after["attention.query.weight"] / before["attention.query.weight"]).view(4, -1)
    wanted = torch.tensor([1.0, 0.5, 1.0, (2 / 3) ** 0.5])
    torch.testing.assert_close(ratio, wanted[:, None].expand_as(ratio))
    assert torch.equal(ratio[[0, 2]], torch.ones(2, 12))


def test_with_a_remainder_the_whole_float32_weight_is_scaled():
    made = model(torch.bfloat16)
    optimizer = NorMuon(made.parameters(), lr=0.1, bf16_remainder=True, compute_dtype=torch.float32)
    weight = made["attention"]["query"].weight  # pyright: ignore[reportIndexIssue]
    for param in made.parameters():
        param.grad = torch.ones_like(param) * torch.arange(6) - param.detach()
    optimizer.step()

    def joined():
        return join_remainder(weight.detach(), optimizer.state[weight]["remainder"])

    before = joined()
    qk_clip(made, LOGITS, tau=7.99, weights=WEIGHTS, optimizer=optimizer)
    gamma = torch.tensor([1.0, 7.99 / 8, 1.0, 1.0]).repeat_interleave(2)[:, None]
    torch.testing.assert_close(joined(), before * gamma.sqrt(), rtol=1e-6, atol=0)
    assert not torch.equal(joined(), before)


def test_a_shard_is_scaled_as_its_part_of_the_whole():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        whole = model().state_dict()["attention.query.weight"]
        for axis in (0, 1):
            part = whole.chunk(2, axis)[1].clone()
            param = DTensor.from_local(part, mesh, [Shard(axis)], run_check=False)
            named = [("attention.query.weight", param)]
            qk_clip(named, LOGITS, tau=2.0, weights=WEIGHTS)
            expected = model()
            qk_clip(expected, LOGITS, tau=2.0, weights=WEIGHTS)
            wanted = expected.state_dict()["attention.query.weight"].chunk(2, axis)[1]
            assert torch.equal(param.to_local(), wanted)
            assert not torch.equal(param.to_local(), whole.chunk(2, axis)[1])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("weights", "logits", "message"),
    [
        (WEIGHTS, {}, r"attention.query.weight: .*got none; give largest_logits={'attention'"),
        (WEIGHTS, {"attention": torch.ones(6)}, r"attention.query.weight: .*shape \(6,\)"),
        ({"*.q.*": HeadLayout(4, 0)}, LOGITS, r"'\*\.q\.\*' meets no parameter; .*query"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_changed(weights, logits, message):
    made = model()
    with pytest.raises(ValueError, match=message):
        qk_clip(made, logits, tau=0.5, weights={**WEIGHTS, **weights})
    for name, value in model().state_dict().items():
        np.testing.assert_array_equal(value, made.state_dict()[name])
