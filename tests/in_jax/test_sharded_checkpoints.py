"""Orbax saves a run on a mesh: it goes on on another mesh, and a save that is killed loses nothing."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.in_jax import saved_run
from tests.in_jax.meshes import mesh_of

BOUND = 1.1e-5
"""Relative to the largest entry of a leaf, four times what was measured between meshes: 2.6e-6."""


def assert_close(one, other):
    for (path, x), y in zip(
        jax.tree_util.tree_flatten_with_path(one)[0], jax.tree.leaves(other), strict=True
    ):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=BOUND * np.abs(y).max(), err_msg=str(path))


@pytest.fixture(scope="module")
def saved_on_eight(tmp_path_factory):
    """A manager with step 2 of a run, and what the run had come to after step 4."""
    mesh = mesh_of(fsdp=4, tp=2)
    two = saved_run.train(*saved_run.begin(mesh), mesh, [1, 2])
    manager = ocp.CheckpointManager(tmp_path_factory.mktemp("saved"))
    manager.save(2, args=ocp.args.StandardSave(two))
    manager.wait_until_finished()
    return manager, saved_run.train(*two, mesh, [3, 4])


@pytest.mark.parametrize("sizes", [dict(fsdp=4, tp=2), dict(fsdp=2, tp=2), dict(fsdp=1, tp=1)])
def test_a_run_saved_on_eight_devices_goes_on_on_others(saved_on_eight, sizes):
    manager, expected = saved_on_eight
    mesh = mesh_of(**sizes)
    params, state = saved_run.restored(manager, 2, mesh)
    assert params["a"].sharding.mesh.shape == mesh.shape
    assert len(params["a"].sharding.device_set) == mesh.size
    assert_close(saved_run.train(params, state, mesh, [3, 4]), expected)
    with pytest.raises(AssertionError):
        assert_close(saved_run.train(params, state, mesh, [3, 5]), expected)


def test_a_run_killed_in_a_save_goes_on_from_the_last_complete_one(tmp_path):
    """SIGKILL after step 3 is written and before it has its name: steps 1 and 2 are there, whole."""
    with subprocess.Popen(
        [sys.executable, saved_run.__file__, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    ) as run:
        assert run.stdout.readline().strip() == "saving"
        run.kill()
    assert any("tmp" in path.name for path in tmp_path.iterdir()), "a save was under way"
    manager = ocp.CheckpointManager(tmp_path)
    assert sorted(manager.all_steps()) == [1, 2]
    mesh = mesh_of(fsdp=2, tp=2)
    alone = saved_run.begin(mesh)
    for step in (1, 2):
        alone = saved_run.train(*alone, mesh, [step])
        assert_close(saved_run.restored(manager, step, mesh), alone)
    again = saved_run.train(*saved_run.restored(manager, 2, mesh), mesh, [3])
    manager.save(3, args=ocp.args.StandardSave(again))
    manager.wait_until_finished()
    assert manager.latest_step() == 3
    assert_close(saved_run.restored(manager, 3, mesh), saved_run.train(*alone, mesh, [3]))
