"""Momentum in int8 in PyTorch: what is kept, bad numbers, and several ranks."""

import re

import numpy as np
import pytest
import torch

from normuon_core import MatrixLayout
from normuon_core.quantization import SMALLEST_SCALE
from parity_tests.compare import infinity_distance
from tests.in_torch import int8_cases as cases
from tests.in_torch.ranks import run_on_ranks
from torch_ref import NorMuon, describe, diagnostics
from torch_ref.leaves.groups import whole_part
from torch_ref.matrices.quantization import dequantized, quantized


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    return run_on_ranks(2, cases.all_cases, tmp_path_factory.mktemp("int8") / "ranks")


@pytest.fixture(scope="module")
def alone():
    return cases.one_process()


@pytest.mark.parametrize("name", ["outputs", "inputs", "from one process"])
def test_ranks_keep_the_integers_of_one_process(ranks, alone, name):
    """The largest distance of a weight is 5e-16: matrices are multiplied in other stacks."""
    for rank in ranks:
        for ours, expected in zip(rank[name], alone, strict=True):
            assert ours["momentum"].dtype == torch.int8
            assert torch.equal(ours["momentum"], expected["momentum"])
            assert torch.equal(ours["momentum_scale"], expected["momentum_scale"])
            assert infinity_distance(ours["weight"], expected["weight"]) < 1e-14
    if name != "from one process":
        assert ranks[0]["inputs, scales here"][1] == (24, 2)
        assert ranks[0]["outputs, scales here"][:2] == [(12, 3), (12, 4)]


def test_owners_in_data_parallelism_step_as_one_process_does(ranks, alone):
    for rank in ranks:
        for ours, expected in zip(rank["process_group"], alone, strict=True):
            assert infinity_distance(ours, expected["weight"]) < 1e-14


@pytest.mark.parametrize("name", ["arrays of inputs", "arrays of owners"])
def test_what_ranks_hold_moves_as_the_floats_of_one_process(ranks, alone, name):
    for rank in ranks:
        for ours, expected in zip(rank[name], alone, strict=True):
            q, scale = expected["momentum"], expected["momentum_scale"]
            part = whole_part(MatrixLayout(-1, -2).on(tuple(q.shape)))
            floats = dequantized(q, scale, part, torch.float64).numpy()
            np.testing.assert_array_equal(ours, floats, strict=True)


def test_a_block_that_ranks_divide_is_refused(ranks):
    pattern = (
        r"group 0, parameter 0.*every 32 entries along axis 1.*Shard\(dim=1\).*multiples of 32"
    )
    assert re.match(pattern, ranks[0]["error"])


def kept(x):
    part = whole_part(MatrixLayout(1, 0).on(tuple(x.shape)))
    q, scale = quantized(x, part)
    return q, scale, dequantized(q, scale, part, x.dtype)


def test_what_was_read_back_is_stored_as_it_was():
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    q, scale, back = kept(x)
    of_entries = scale.float().repeat_interleave(32, dim=1)[:, :70]
    assert ((back - x).abs() <= 0.5001 * of_entries).all()
    assert all(
        torch.equal(one, other) for one, other in zip(kept(back), (q, scale, back), strict=True)
    )
    assert not kept(0 * x)[2].any()
    tiny = kept(1e-40 * x.sign())
    assert tiny[1].min() == SMALLEST_SCALE
    assert (tiny[2].abs() <= SMALLEST_SCALE).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_block_with_a_number_that_is_not_finite_is_read_back_as_nan(bad):
    x = torch.ones(3, 70)
    x[1, 40] = bad
    back = kept(x)[2]
    expected = torch.zeros(3, 70, dtype=torch.bool)
    expected[1, 32:64] = True
    assert torch.equal(back.isnan(), expected)


def test_the_table_and_the_errors_say_what_int8_is():
    model = torch.nn.Sequential(torch.nn.Linear(64, 96, bias=False), torch.nn.Linear(96, 3))
    text = describe(model, momentum_dtype=torch.int8)
    assert "momentum 6,144, momentum scale 384" in text
    with pytest.raises(ValueError, match=r"group 0: momentum_dtype=torch.int16 cannot hold a mean"):
        NorMuon([model[0].weight], lr=0.1, momentum_dtype=torch.int16)
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"backend='triton': .*momentum_dtype='int8'"):
        NorMuon([model[0].weight], lr=0.1, momentum_dtype=torch.int8, backend="triton")


def test_the_errors_of_a_step_are_measured_of_what_int8_keeps():
    found = []
    for dtype in (torch.int8, None):
        param = torch.nn.Parameter(torch.zeros(24, 75))
        optimizer = NorMuon([param], lr=0.1, momentum_dtype=dtype, compute_dtype=torch.float32)
        for seed in range(2):
            param.grad = cases.draw(seed)[0].float()
            if seed == 0:
                optimizer.step()
        (errors,) = diagnostics.orthogonality_errors(optimizer).values()
        found.append(errors)
    torch.testing.assert_close(*found, rtol=0.05, atol=0)
