"""`torch_ref.NorMuon` on 1, 2 and 4 ranks: DTensors, plain data parallelism, and their checkpoints."""

import contextlib
import fcntl
import os
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.distributed.tensor import Shard

import optax_normuon
from parity_tests.compare import infinity_distance
from tests.in_torch import distributed_cases as cases
from tests.in_torch.ranks import run_on_ranks

RANKS = [4, 2, 1]

BOUNDS = {
    # 4 x 2.8e-15, 7.6e-14, 2.2e-16
    torch.float64: {"weights": 1.1e-14, "second_moment": 3.0e-13, "radius": 8.8e-16},
    # Those of T1; 3.4e-6, 4.7e-5, 1.1e-7
    torch.float32: {"weights": 1.2e-5, "second_moment": 3.4e-4, "radius": 4.6e-7},
    # Float32 weights; 1.4e-6, 4.3e-5
    torch.bfloat16: {"weights": 1.2e-5, "second_moment": 3.4e-4},
}
"""Relative infinity norms, the largest measured ones beside them. What is missing here is equal to the
bit: the elementwise stages do the same arithmetic wherever they run."""

MESHES = ["Shard(0)", "Shard(1)", "Shard(last)", "Replicate"]
SQUARE = [
    "Shard(0), Shard(1)",
    "Shard(1), Shard(1)",
    "Replicate, Shard(0)",
    "Shard(1), Replicate",
    "Strided(0), Shard(0)",
]
ALL_RUNS = [
    *((ranks, name, torch.float64) for ranks in (2, 1) for name in MESHES),
    *((4, name, torch.float64) for name in ("Shard(0)", "Shard(1)", *SQUARE)),
    (2, "Shard(1)", torch.float32),
    *(
        (ranks, kind, dtype)
        for ranks in RANKS
        for kind in cases.KINDS
        for dtype in cases.DTYPES[ranks]
    ),
    *(
        (ranks, f"{name}, one matrix a rank", torch.float64)
        for ranks in RANKS
        for name in ("Shard(0)", "process_group")
    ),
]


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """What all cases made, by the number of ranks; run once, whichever worker asks first."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    kept = folder / "ranks.pickle"
    with open(folder / "ranks.lock", "w") as lock, contextlib.ExitStack() as stack:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stack.callback(fcntl.flock, lock, fcntl.LOCK_UN)
        if not kept.exists():
            checkpoints = folder / "checkpoints"
            made = {
                ranks: run_on_ranks(
                    ranks, cases.all_cases, folder / f"{ranks} ranks", checkpoints, ranks == 4
                )
                for ranks in RANKS
            }
            kept.write_bytes(pickle.dumps(made))
        return pickle.loads(kept.read_bytes())


@pytest.fixture(scope="module")
def on_one_process():
    """The same weights as plain tensors, by dtype and keywords."""
    known = {}

    def run(dtype, **keywords):
        key = (dtype, *keywords.items())
        if key not in known:
            weights, optimizer = cases.build(cases.alone, dtype, **keywords)
            cases.train(weights, optimizer)
            known[key] = cases.outcome(weights, optimizer)
        return known[key]

    return run


def single_run(on_one_process, dtype):
    if dtype != torch.bfloat16:
        return on_one_process(dtype)
    return on_one_process(dtype, bf16_remainder=True, **cases.HALF)


def distances(actual, expected):
    assert actual.keys() == expected.keys()
    return {
        key: max(
            infinity_distance(ours.double(), theirs.double())
            for ours, theirs in zip(actual[key], expected[key], strict=True)
        )
        for key in expected
    }


def assert_near(actual, expected, dtype):
    found = distances(actual, expected)
    assert all(found[key] <= BOUNDS[dtype].get(key, 0.0) for key in found), found


@pytest.mark.parametrize(("ranks", "name", "dtype"), ALL_RUNS, ids=str)
def test_ranks_step_as_one_process_does(on_ranks, on_one_process, ranks, name, dtype):
    assert_near(on_ranks[ranks][0][name, dtype], single_run(on_one_process, dtype), dtype)


def test_the_bounds_tell_other_gradients_apart(on_ranks):
    run = on_ranks[2][0]["process_group", torch.float64]
    weights, optimizer = cases.build(cases.alone)
    cases.train(weights, optimizer, [1, 0])
    found = distances(run, cases.outcome(weights, optimizer))
    assert found["weights"] > 1e6 * BOUNDS[torch.float64]["weights"]


@pytest.mark.parametrize("ranks", RANKS)
def test_all_ranks_have_the_same_bits(on_ranks, ranks):
    first, *others = on_ranks[ranks]
    for other in others:
        for key, run in first.items():
            if isinstance(run, dict) and "weights" in run:
                assert max(distances(other[key], run).values()) == 0.0, key


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_checkpoint_of_four_ranks_goes_on_on_any_number(on_ranks, on_one_process, ranks, kind):
    run = on_ranks[ranks][0]
    assert_near(run["continued " + kind], on_one_process(torch.float64), torch.float64)
    lowered = on_one_process(torch.bfloat16, bf16_remainder=True)
    # bfloat16 products on the CPU are the same in every stack. The norms on hyperballs, which ranks add
    # up, differ by float32's rounding: 9.0e-8 of the weights.
    bound = 3.6e-7 if kind == "fully_shard" else 0.0
    assert max(distances(run[f"continued {kind} lowered"], lowered).values()) <= bound


@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_checkpoint_of_four_ranks_goes_on_without_any(
    on_ranks, on_one_process, kind, tmp_path_factory
):
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    weights, optimizer = cases.build(cases.alone)
    cases.restore(folder / "checkpoints", kind, weights, optimizer)
    cases.train(weights, optimizer, range(1, cases.STEPS))
    assert_near(cases.outcome(weights, optimizer), on_one_process(torch.float64), torch.float64)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_a_state_dict_of_one_process_is_divided(on_ranks, on_one_process, ranks, kind):
    run = on_ranks[ranks][0]["from one process " + kind]
    assert_near(run, on_one_process(torch.float64), torch.float64)


@pytest.mark.parametrize("ranks", [4, 2])
@pytest.mark.parametrize(("divided", "axis"), [("rows", 0), ("columns", 1)])
@pytest.mark.parametrize("name", cases.SPHERES)
def test_a_divided_slice_goes_along_its_sphere_as_a_whole_one(on_ranks, ranks, divided, axis, name):
    """Measured: 4.4e-16."""
    found, placements = on_ranks[ranks][0]["spheres"][divided][name]
    wanted, _ = cases.on_spheres(cases.alone)[name]
    assert (found - wanted).abs().max() <= 1.8e-15
    assert placements == (Shard(axis),)


@pytest.mark.parametrize("ranks", [4, 2])
def test_a_stack_takes_few_collectives_and_gathers_nothing(on_ranks, ranks):
    counted = on_ranks[ranks][0]["collectives"]
    # Columns divided: every rank has the second moment of the rows already, and it has to come back.
    assert counted["columns"] == {"all_reduce": 1, "all_to_all_single": 3}
    assert counted["rows"] == {"all_reduce": 1, "all_to_all_single": 4}
    assert counted["rms"] == {"all_reduce": 1, "all_to_all_single": 4}
    assert counted["muon"] == {"all_reduce": 1, "all_to_all_single": 2}
    # And two for the norms of all matrices together.
    assert counted["hyperball"] == {"all_reduce": 3, "all_to_all_single": 2}
    assert counted["whole matrices"] == {}
    assert counted["replicas"] == {"reduce_scatter_tensor": 1, "all_gather_into_tensor": 1}


@pytest.mark.parametrize("ranks", [4, 2])
def test_each_rank_keeps_its_share_of_the_state(on_ranks, ranks):
    for shares in ("shards", "replicas"):
        kept = [each["kept"][shares] for each in on_ranks[ranks]]
        assert sum(kept) == 8 * 12 * 8
        assert max(kept) == min(kept)


@pytest.mark.parametrize("ranks", [4, 2])
def test_data_parallel_keeps_the_buffers_of_two_stacks_at_most(on_ranks, ranks):
    for each in on_ranks[ranks]:
        assert each["buffers"] == {"stacks": 6, "most": 2}


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (
            "triton",
            r"ValueError: group 0, parameter 0.*backend='triton' takes plain.*Shard\(dim=0\)",
        ),
        (
            "process_group",
            r"ValueError: group 0, parameter 0.*divided already.*leave process_group out",
        ),
        ("partial", r"ValueError: group 0, parameter 0.*Partial\(sum\).*DeviceMesh.*redistribute"),
        ("strided", r"ValueError: group 0, parameter 0.*sf=2.*no contiguous shards.*redistribute"),
        ("plain gradient", r"RuntimeError: group 0, parameter 0.*gradient is on a plain tensor"),
        ("copy", r"TypeError: a NorMuon with a process_group cannot be copied"),
    ],
)
def test_what_cannot_be_done_says_so(on_ranks, attempt, message):
    assert re.match(message, on_ranks[4][0]["errors"][attempt], re.DOTALL)


@pytest.mark.parametrize("name", ["Shard(1)", "fully_shard", "process_group"])
@pytest.mark.parametrize(
    ("ranks", "dtype", "bound"), [(4, np.float64, 1e-12), (2, np.float32, 1.2e-5)]
)
def test_ranks_agree_with_jax_on_one_device(on_ranks, name, ranks, dtype, bound):
    run = on_ranks[ranks][0][name, torch.float64 if dtype == np.float64 else torch.float32]
    number, moved = 0, []
    with jax.enable_x64(dtype == np.float64):
        for index, (shapes, settings) in enumerate(cases.GROUPS):
            numbers = range(number, number + len(shapes))
            number += len(shapes)
            if index not in IN_JAX:
                continue
            ours = train_in_jax([n for n in numbers if n != cases.NO_GRADIENT], settings, dtype)
            for n, weight in ours.items():
                moved.append(infinity_distance(run["weights"][n].numpy(), weight))
    assert max(moved) <= bound, max(moved)


IN_JAX = [0, 4, 5, 16, 17, 18]
"""Which groups: several matrices of one shape, multipliers over a batch, a fused projection, and
hyperballs."""


def train_in_jax(numbers, settings, dtype):
    settings = dict(settings)
    lr, layout = settings.pop("lr", 0.05), settings.pop("layout", cases.OUT_IN)
    weights, gradients = cases.draw_weights(), [cases.draw_gradients(s) for s in range(cases.STEPS)]
    multipliers = {
        key: jnp.asarray(settings.pop(key), dtype)
        for key in ("lr_mul", "wd_mul")
        if key in settings
    }
    tx = optax_normuon.normuon(
        lr,
        weight_decay=0.2,
        compute_dtype=dtype,
        layout={str(n): layout for n in numbers},
        **{key: {str(n): value for n in numbers} for key, value in multipliers.items()},
        **settings,
    )
    params = {str(n): jnp.asarray(weights[n], dtype) for n in numbers}
    state, update = tx.init(params), jax.jit(tx.update)
    for step in gradients:
        updates, state = update(
            {str(n): jnp.asarray(step[n], dtype) for n in numbers}, state, params
        )
        params = optax.apply_updates(params, updates)
    return {n: np.asarray(params[str(n)]) for n in numbers}
