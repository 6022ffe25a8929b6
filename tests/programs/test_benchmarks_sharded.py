"""The benchmark of meshes: what it reads from compiled programs, its arithmetic, and its command."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from typer.testing import CliRunner

from benchmarks import mesh_rates, mesh_steps, sharded
from benchmarks.collectives import Collective, by_kind, bytes_bound, collectives
from benchmarks.paper_model import LLAMAS, PaperRates, step_on_paper

# On virtual CPU devices, wherever the tests run.
MESH = Mesh(
    np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2
)


def made_by(function, x):
    """The collectives of a function of x on every device."""
    whole = PartitionSpec()
    mapped = jax.shard_map(function, mesh=MESH, in_specs=whole, out_specs=whole, check_vma=False)
    return collectives(jax.jit(mapped).lower(x).compile().as_text(), MESH.size)


def run(*arguments: str):
    app = typer.Typer()
    app.command()(sharded.main)
    # Optax's own Muon mixes dtypes, which the tests forbid.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return CliRunner().invoke(app, list(arguments))


@pytest.mark.parametrize(
    ("make", "expected", "sent"),
    [
        (
            lambda x: jax.lax.all_to_all(x, ("a", "b"), 0, 0),
            Collective("all-to-all", 8, 8 * 3 * 4),
            7 / 8 * 96,
        ),
        (
            lambda x: jax.lax.all_gather(x, "b").sum(0),
            Collective("all-gather", 4, 8 * 3 * 4),
            3 * 96,
        ),
        (lambda x: jax.lax.psum(x, "a"), Collective("all-reduce", 2, 8 * 3 * 4), 2 * 96 / 2),
        (
            lambda x: jnp.tile(jax.lax.psum_scatter(x, "b", tiled=True), (4, 1)),
            Collective("reduce-scatter", 4, 8 * 3 * 4),
            3 / 4 * 96,
        ),
        (
            lambda x: jax.lax.ppermute(x, ("a", "b"), [(i, (i + 1) % 8) for i in range(8)]),
            Collective("collective-permute", 8, 8 * 3 * 4),
            96,
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, Collective) else "",
)
def test_a_collective_is_counted_with_its_devices_and_bytes(make, expected, sent):
    """On (8, 3) float32, 96 bytes; what a device sends is reckoned by hand."""
    assert made_by(make, jnp.ones((8, 3))) == [expected]
    assert expected.sent == pytest.approx(sent)


def test_a_collective_in_a_loop_is_made_in_every_round():
    def loop(x):
        return jax.lax.fori_loop(0, 5, lambda _, x: jax.lax.psum(x, "b") * 0.1, x)

    (found,) = made_by(loop, jnp.ones(6))
    assert found == Collective("all-reduce", 4, 24, in_loop=True, runs=5)
    assert found.sent == pytest.approx(5 * 2 * 3 / 4 * 24)
    kinds = by_kind([found, Collective("all-reduce", 4, 24)])
    assert kinds == {"all-reduce": {"count": 2, "in loops": 1, "runs": 6, "sent": 6 * 36}}


def test_a_loop_of_unknown_length_counts_as_one_round():
    def loop(x):
        return jax.lax.while_loop(lambda x: x[0] < 99, lambda x: jax.lax.psum(x, "b"), x)

    assert made_by(loop, jnp.ones(6)) == [Collective("all-reduce", 4, 24, in_loop=True)]


@pytest.mark.parametrize(("axes", "devices"), [("a", 2), ("b", 4), (("a", "b"), 8)])
def test_collectives_of_the_partitioner_are_read_too(axes, devices):
    """XLA's partitioner writes groups of devices as axes of a mesh."""
    lies = NamedSharding(MESH, PartitionSpec(None, axes))
    product = jax.jit(lambda x: x @ x.T, out_shardings=NamedSharding(MESH, PartitionSpec()))
    text = product.lower(jax.device_put(jnp.ones((6, 8)), lies)).compile().as_text()
    assert "replica_groups=mesh[" in text
    assert collectives(text, 8) == [Collective("all-reduce", devices, 6 * 6 * 4)]


def test_asynchronous_collectives_are_counted_once():
    """As compilers for GPUs write them: a start with the operands' bytes, and a done without."""
    text = """HloModule m

ENTRY %main (p.1: bf16[8,3], q.1: pred[5]) -> bf16[8,3] {
  %p.1 = bf16[8,3]{1,0} parameter(0)
  %q.1 = pred[5]{0} parameter(1)
  %g = ((bf16[8,3]{1,0}, pred[5]{0}), (bf16[32,3]{1,0}, /*index=1*/pred[20]{0})) all-gather-start(%p.1, \
/*index=1*/%q.1), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %d = (bf16[32,3]{1,0}, pred[20]{0}) all-gather-done(%g)
  %t = ((bf16[8,3]{1,0}), bf16[8,3]{1,0}) all-to-all-start(%p.1), replica_groups={}, dimensions={0}
  ROOT %u = bf16[8,3]{1,0} all-to-all-done(%t)
}
"""
    assert collectives(text, 8) == [
        Collective("all-gather", 4, 48 + 5),
        Collective("all-to-all", 8, 48),
    ]
    wrapped = text.replace(
        "ENTRY",
        """%w (x.1: bf16[8,3]) -> bf16[8,3] {
  %x.1 = bf16[8,3]{1,0} parameter(0)
  ROOT %y = bf16[8,3]{1,0} all-to-all(%x.1), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}
}

ENTRY""",
    )
    for end in ("start", "done"):
        wrapped = wrapped.replace(f"all-to-all-{end}(", f"async-{end}(")
    wrapped = wrapped.replace("replica_groups={}, dimensions={0}", "calls=%w")
    wrapped = wrapped.replace("async-done(%t)", "async-done(%t), calls=%w")
    assert collectives(wrapped, 8)[1:] == [Collective("all-to-all", 2, 48)]
    part = text.replace("[2,4]<=[8]", "mesh['x'=2,'y'=4] {'x','y':(1)2}")
    assert collectives(part, 8)[0].devices == 4
    with pytest.raises(ValueError, match="unknown notation"):
        collectives(text.replace("[2,4]<=[8]", "something"), 8)
    with pytest.raises(ValueError, match="no ENTRY"):
        collectives("", 8)


def test_the_bound_is_each_matrix_once_there_and_once_back():
    """1000 entries on 4 devices: 250 a device, two bytes each, of which 3 of 4 leave it, twice."""
    assert bytes_bound(1000, 4) == 250 * 2 * 3 / 4 * 2
    assert bytes_bound(1000, 1) == 0


def test_a_step_repeated_alone_sends_the_same_bytes():
    """NorMuon also keeps to the bound, apart from its second moments, which count on small matrices."""
    mesh = mesh_steps.mesh_of(jax.devices()[:2])
    step = mesh_steps.step(mesh_steps.normuon, [(2, 64, 256)], mesh)
    sent = sum(each.sent for each in step.collectives)
    assert 1 < sent / bytes_bound(2 * 64 * 256, 2) < 1.05
    assert not any(each.in_loop for each in step.collectives)
    alone = mesh_steps.replay(step.collectives, mesh)
    assert by_kind(alone.collectives) == by_kind(step.collectives)
    jax.block_until_ready(alone.function(alone.carry))


def test_every_all_to_all_of_a_chain_is_made():
    mesh = mesh_steps.mesh_of(jax.devices()[:2])
    each = Collective("all-to-all", 2, 64)
    assert mesh_steps.repeat(each, mesh, 3).collectives == [each] * 3
    rate, start = mesh_rates.all_to_all_rates(mesh, operand_bytes=2**12)
    assert rate > 0
    assert start > 0
    with pytest.raises(ValueError, match="no collective of a NorMuon step"):
        mesh_steps.repeat(Collective("reduce-scatter", 2, 64), mesh, 1)


def test_the_models_on_paper_are_those_that_they_are_called():
    """Parameters less two embeddings of 128256 x width and the norms: 8.03e9 and 70.55e9 in all."""
    entries = {name: sum(n * r * c for n, r, c in shapes) for name, shapes in LLAMAS.items()}
    assert entries["Llama 3 8B"] + 2 * 128256 * 4096 == pytest.approx(8.03e9, rel=1e-3)
    assert entries["Llama 3 70B"] + 2 * 128256 * 8192 == pytest.approx(70.55e9, rel=1e-3)


def test_a_step_on_paper_is_what_is_reckoned_by_hand():
    """3 of 2048x8192 on 16 devices, one a device, at half of 1e12 FLOP/s and 1e9 bytes/s.

    A matrix takes 38 n^3. A device sends 15/16 of 2 x 2 bytes x 2048 x 8192, 8 peers of 15 being on the
    other host, in four all-to-alls.
    """
    rates = PaperRates(
        products=1e12, copies=1e9, share=0.5, within=1e12, start=1e-3, between=1e8, message=1e-4
    )
    step = step_on_paper("a model", [(3, 2048, 8192)], 16, rates)
    (group,) = step.groups
    assert (group.placement.strategy, group.placement.each) == ("owners", 1)
    assert (group.placement.padding, group.stacks) == (13, 1)
    operations, sent = 38 * 2048**3, 4 * 2048 * 8192 * 15 / 16
    assert step.parts == pytest.approx(
        {
            "products": operations / 5e11,
            "memory": 30 * 3 * 2048 * 8192 / 16 / 5e8,
            "wire": sent * 8 / 15 / 1e8,
            "messages": 4 * (1e-3 + 8 * 1e-4),
        }
    )
    assert step.unevenness == pytest.approx(16 / 3)
    assert group.message_bytes == pytest.approx(2 * 2048 * 8192 / 16)
    assert step.seconds == pytest.approx(sum(step.parts.values()))
    slow_within = step_on_paper("a model", [(3, 2048, 8192)], 16, replace(rates, within=1e6))
    assert slow_within.parts["wire"] == pytest.approx(sent * 7 / 15 / 1e6)


def test_within_a_host_the_measured_rate_counts():
    """Two devices and 32 matrices: 16 a device, which a gigabyte holds eight at a time."""
    rates = PaperRates(products=1e15, copies=1e12, share=1.0, within=1e11, start=1e-3, between=1.0)
    step = step_on_paper("a model", [(32, 2048, 8192)], 2, rates)
    assert step.groups[0].stacks == 2
    assert step.parts["wire"] == pytest.approx(16 * 2048 * 8192 * 2 / 1e11)
    assert step.parts["messages"] == pytest.approx(4 * 2 * 1e-3)
    assert step.unevenness == pytest.approx(1)


def test_matrices_of_two_shapes_have_different_owners():
    """Three of each on eight devices: the busiest has one of the longer ones, and no device has two."""
    rates = PaperRates(products=1e15, copies=1e12, share=1.0, within=1e11, start=0.0)
    shapes = [(3, 1024, 1024), (3, 2048, 2048)]
    step = step_on_paper("a model", shapes, 8, rates)
    short, long = (group.products for group in step.groups)
    assert step.undealt == pytest.approx(short + long)
    assert step.parts["products"] == pytest.approx(long)
    # What divides evenly, and what has nothing to be dealt with, stays as it is.
    for shapes in ([(8, 1024, 1024), (16, 2048, 2048)], [(3, 1024, 1024)]):
        step = step_on_paper("a model", shapes, 8, rates)
        assert step.parts["products"] == pytest.approx(step.undealt)


@pytest.mark.parametrize(
    ("rates", "count", "devices", "reason"),
    [
        (dict(), 8, 2, "evenly shared: more devices would be faster"),
        (dict(), 9, 8, "1.78 times an even share: some devices have a matrix more"),
        (dict(), 3, 8, "whole matrices, 3 in all"),
        (dict(copies=1.0), 8, 8, "traffic of each device's own memory"),
        (dict(within=1.0), 8, 8, "bytes on the wire"),
        (dict(start=1e9), 8, 8, "the number of messages, 262 kB the smallest"),
    ],
)
def test_what_limits_a_step_is_said(rates, count, devices, reason):
    given = dict(products=1e9, copies=1e15, share=1.0, within=1e15, start=0.0)
    step = step_on_paper("a model", [(count, 1024, 1024)], devices, PaperRates(**given | rates))
    assert reason in step.limit
    assert f"a model on {devices}: 100% of the step is" in step.limit


def test_goals_are_kept_from_their_own_side():
    assert sharded.Goal("bytes", 1.05, 1.05, at_most=True).met
    assert not sharded.Goal("bytes", 1.06, 1.05, at_most=True).met
    assert sharded.Goal("speed", 1.8, 1.8, at_most=False).met
    assert not sharded.Goal("speed", 1.7, 1.8, at_most=False).met


def test_shares_of_communication_are_of_the_step_on_the_mesh():
    first, second = sharded.communication({sharded.OURS: 4.0, sharded.WORK: 3.0, sharded.WIRE: 0.5})
    assert first.startswith("communication is 12.5% of the step")
    assert second.startswith("being divided takes 25.0% of the step")
    assert list(sharded.communication({sharded.WORK: 3.0})) == []


def test_a_quick_run_on_two_devices_writes_its_files(tmp_path, monkeypatch):
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    result = run("--quick", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "no GPU: no time here" in result.output
    found = json.loads((tmp_path / "sharded.json").read_text(), parse_constant=pytest.fail)
    rows = {row["who"]: row for row in found["rows"]}
    assert {row["failure"] for row in rows.values()} == {None}
    assert min(row["milliseconds"] for row in rows.values()) > 0
    # The same matrices, all on one device or half of them.
    assert rows[sharded.ALONE]["operations"] == 2 * rows[sharded.WORK]["operations"]
    steps = {sharded.OURS, sharded.APPLY, sharded.STACKS, sharded.PEER}
    assert set(found["collectives"]) == {*steps, sharded.WIRE}
    assert set(found["collectives"][sharded.OURS]) == {"all-reduce", "all-to-all"}
    # For each of two shapes matrices and second moments, there and back.
    assert found["collectives"][sharded.OURS]["all-to-all"]["runs"] == 8
    figures = {goal["what"]: goal["value"] for goal in found["goals"]}
    assert 1 < figures["bytes sent over the bound"] < 1.1
    times = rows[sharded.PEER]["milliseconds"] / rows[sharded.OURS]["milliseconds"]
    assert figures["over optax.contrib.muon, times as fast"] == pytest.approx(times)
    paper = [(step["model"], step["devices"]) for step in found["paper"]]
    assert paper == [("tiny", 2), *((llama, count) for llama in LLAMAS for count in (64, 1024))]
    text = (tmp_path / "sharded.md").read_text()
    for said in ("## Goals", "Llama 3 70B on 1024: ", "assumed: 8 devices a host, 50 GB/s"):
        assert said in text


def test_one_device_is_told_that_two_are_needed(tmp_path, monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    result = run("--quick", "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "at least two devices" in result.output
    assert "JAX_NUM_CPU_DEVICES=2" in result.output
    assert not list(tmp_path.iterdir())


def test_a_step_that_fails_is_a_line_with_its_reason(monkeypatch):
    def fail():
        raise MemoryError("out of memory\nand more")

    monkeypatch.setattr(mesh_steps, "optax_muon", fail)
    mesh = mesh_steps.mesh_of(jax.devices()[:2])
    shapes = [(2, 8, 8)]
    rows, found = sharded.time_steps("tiny", shapes, mesh, sharded.Rates(1e9, 1e9), calls=1)
    (peer,) = [row for row in rows if row.who == sharded.PEER]
    assert (peer.milliseconds, peer.failure) == (None, "MemoryError: out of memory")
    assert sharded.PEER not in found
    goals = [goal.what for goal in sharded.goals_of(rows, found, shapes, 2)]
    assert not any("optax" in what for what in goals)
