"""The example on a mesh: its text, what lies where, and the losses of one device."""

import asyncio
import functools
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

import examples.training
from examples.errors import BadInput
from examples.gpt import GPTConfig
from examples.launch import open_mesh
from examples.mesh import parameter_spec, place_batch, read_mesh
from examples.optimizers import OptimizerConfig
from examples.presets import PRETRAIN, with_preset
from examples.pretrain import Pretrain
from examples.runs import read_run
from examples.settings import Devices, Training
from examples.step import first_state

SMALL_CORPUS = Path(asyncio.__file__).parent
TRAINING = Training(steps=6, batch=8, evaluate_every=3, evaluation_batches=2)
MEASURED = 3.4e-6  # the largest difference of a loss below, in nats a byte


@functools.cache
def prepared():
    model = GPTConfig(width=32, depth=1, heads=2, context=32)
    return Pretrain(SMALL_CORPUS, model=model, training=TRAINING).prepare(None)


@functools.cache
def trained(optimizer, text):
    """All losses of a short run, and `pieces` of parameters and state at its beginning and end.

    Args:
      text: a mesh, or None for one device.
    """
    lay = []

    def looked_at(state):
        lay.append((pieces(state.params), pieces(state.opt_state)))
        return state

    folder = Path(tempfile.mkdtemp())
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(examples.training, "first_state", lambda *x: looked_at(first_state(*x)))
        state = examples.training.train(
            prepared().task,
            TRAINING,
            with_preset(OptimizerConfig(optimizer), PRETRAIN, width=32),
            folder,
            mesh=None if text is None else read_mesh(text),
        )
    looked_at(state)
    (folder / "config.toml").touch()
    run = read_run(folder)
    shutil.rmtree(folder)
    evaluated = [each.validation_loss for each in run.evaluations]
    return np.array([*run.losses.values(), *evaluated]), *lay


@pytest.mark.parametrize(
    ("optimizer", "text"),
    [
        ("normuon", "fsdp=2,tensor=2"),
        ("normuon", "data=2"),
        ("adamw", "fsdp=2,tensor=2"),
    ],
)
def test_a_run_on_a_mesh_has_the_losses_of_one_device(optimizer, text):
    alone, divided = trained(optimizer, None)[0], trained(optimizer, text)[0]
    np.testing.assert_allclose(divided, alone, rtol=0, atol=4 * MEASURED)
    assert alone[-1] < alone[0] - 1.0


def test_another_optimizer_has_other_losses():
    assert abs(trained("adamw", None)[0] - trained("normuon", None)[0])[-1] > 1e-3


def test_parameters_and_state_lie_where_the_rule_says_from_the_first_step_to_the_last():
    _, (params, state), at_the_end = trained("normuon", "fsdp=2,tensor=2")
    assert at_the_end == (params, state)
    assert params == {
        "embed/embedding": (128, 16),
        "lm_head/kernel": (16, 128),
        **{f"blocks/0/attention/{name}/kernel": (16, 16) for name in ("query", "key", "value")},
        "blocks/0/attention/out/kernel": (16, 16),
        "blocks/0/mlp/up/kernel": (16, 64),
        "blocks/0/mlp/down/kernel": (64, 16),
        **{f"{name}/scale": (32,) for name in ("embed_norm", "head_norm")},
        **{f"blocks/0/{name}/scale": (32,) for name in ("attention_norm", "mlp_norm")},
        **{f"blocks/0/attention/{name}/scale": (16,) for name in ("query_norm", "key_norm")},
    }
    assert {shape for name, shape in state.items() if name.endswith("mlp/up/kernel")} == {
        (16, 64),  # momentum
        (1, 64),  # second moment of the output neurons, the columns
    }
    moments = [shape for name, shape in state.items() if name.endswith("embed/embedding")]
    assert moments == [(128, 16)] * 2


def pieces(tree):
    """The shape of each leaf's part on one device."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.addressable_data(0).shape
        for path, leaf in leaves
    }


@pytest.mark.parametrize(
    ("layer", "shape", "sizes", "spec"),
    [
        ("query", (32, 32), {"fsdp": 2, "tensor": 2}, ("fsdp", "tensor")),
        ("down", (128, 32), {"fsdp": 2, "tensor": 2}, ("tensor", "fsdp")),
        ("down", (128, 32), {"tensor": 3, "fsdp": 2}, (None, "fsdp")),
        ("embed", (256, 32), {"fsdp": 2}, ("fsdp", None)),
        ("up", (32, 128), {"data": 2, "other": 2}, (None, None)),
        ("mlp_norm", (32,), {"fsdp": 2, "tensor": 2}, ()),
        ("query", (3, 32, 32), {"fsdp": 2, "tensor": 2}, (None, "fsdp", "tensor")),
    ],
)
def test_matrices_are_divided_where_sizes_divide(layer, shape, sizes, spec):
    mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
    assert parameter_spec(layer, shape, mesh) == PartitionSpec(*spec)  # pyright: ignore


@pytest.mark.parametrize("text", ["fsdp=2,tensor=2", "tensor=2,data=2", "other=4", "fsdp=2,data=2"])
def test_a_batch_is_divided_over_fsdp_and_data(text):
    mesh = read_mesh(text)
    windows = np.arange(8 * 3, dtype=np.uint8).reshape(8, 3)
    placed = place_batch({"tokens": windows}, mesh)["tokens"]
    np.testing.assert_array_equal(placed, windows)
    parts = np.prod([size for axis, size in mesh.shape.items() if axis in ("fsdp", "data")])
    assert {shard.data.shape for shard in placed.addressable_shards} == {(8 / parts, 3)}


def test_a_mesh_is_read_in_the_order_of_its_text():
    mesh = read_mesh(" tensor=2, fsdp=1,other=2")
    assert list(mesh.shape.items()) == [("tensor", 2), ("fsdp", 1), ("other", 2)]
    assert len(set(mesh.devices.flat)) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "6 rows cannot be divided over 4 parts: give a multiple of 4"),
        ("fsdp", "'fsdp' is no name=size"),
        ("fsdp=0", "'fsdp=0' is no name=size"),
        ("fsdp=2,", "'' is no name=size"),
        ("fsdp=2,fsdp=2", "'fsdp' is there twice"),
        ("fsdp=8,tensor=2", "JAX_NUM_CPU_DEVICES=16"),
        ("fsdp=2,data=2", "over 4 parts and fsdp=2,data=2: give a multiple of 16"),
    ],
)
def test_a_mesh_that_does_not_fit_names_the_remedy(text, said):
    with pytest.raises(BadInput, match=said):
        open_mesh(
            Pretrain(
                optimizer=OptimizerConfig(accumulation=4),
                training=Training(batch=6),
                devices=Devices(text, None, None, None),
            )
        )
