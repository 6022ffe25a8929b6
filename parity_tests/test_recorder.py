"""The recorder's traces, of optimizers in either framework, are traces that `identify` names."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from parity_tests.divergence import first_divergence
from parity_tests.identification.identify import identify
from parity_tests.recorder import Recorder, in_float64
from parity_tests.traces import read_file

SHAPES = {"tall": (8, 5), "wide": (5, 8), "square": (6, 6)}
STEPS = 3


def arrays(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal(shape) for name, shape in SHAPES.items()}


def record_torch(path, make, *, seed=0, lift=True):
    params = {name: torch.nn.Parameter(torch.tensor(a)) for name, a in arrays(seed).items()}
    optimizer = make(list(params.values()))
    recorder = Recorder(params)
    for step in range(1, STEPS + 1):
        for name, grad in arrays(100 * seed + step).items():
            params[name].grad = torch.tensor(grad)
        if lift:
            with in_float64():
                optimizer.step()
        else:
            optimizer.step()
        recorder.add_torch(optimizer)
    recorder.save(path)
    return path


def torch_muon(**options):
    return lambda params: torch.optim.Muon(params, lr=0.02, **options)


def test_pytorchs_muon_is_named(tmp_path):
    found = identify(record_torch(tmp_path / "a.npz", torch_muon(weight_decay=0.3)))
    assert found.name == "torch_muon"
    assert found.keywords == {"recipe": "torch_muon", "weight_decay": 0.3}
    assert found.exact


def test_half_precision_hides_the_last_digits_and_not_the_name(tmp_path):
    found = identify(record_torch(tmp_path / "a.npz", torch_muon(weight_decay=0.3), lift=False))
    assert {found.name, *found.also} & {"torch_muon", "muon_keller"}
    assert 1e-4 < found.difference < 0.2
    assert not found.exact


def test_the_casts_are_pytorchs_own_again():
    with in_float64():
        assert torch.ones(2).bfloat16().dtype == torch.float64
    assert torch.ones(2).bfloat16().dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.usefixtures("x64")
def test_optaxs_muon_is_named_from_a_jax_run(tmp_path):
    params = {name: jnp.asarray(a) for name, a in arrays(0).items()}
    tx = optax.contrib.muon(0.02, beta=0.9, weight_decay=0.1)
    state, recorder = tx.init(params), Recorder(params)
    for step in range(1, STEPS + 1):
        grads = jax.tree.map(jnp.asarray, arrays(step))
        with jax.numpy_dtype_promotion("standard"):  # Optax's bias correction promotes its count.
            updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        recorder.add(params, grads, lr=0.02, mu=0.9)
    recorder.save(tmp_path / "a.npz")
    found = identify(tmp_path / "a.npz")
    assert (found.name, found.in_out, found.exact) == ("optax_muon", True, True)


def test_an_optimizer_without_a_momentum_is_asked_for_it(tmp_path):
    with pytest.raises(ValueError, match="no momentum among .*; give it: add_torch"):
        record_torch(tmp_path / "a.npz", lambda params: torch.optim.Adagrad(params, lr=0.1))


def test_traces_part_at_a_step_a_weight_and_a_stage(tmp_path):
    one = record_torch(tmp_path / "a.npz", torch_muon(weight_decay=0.3))
    other = record_torch(tmp_path / "b.npz", torch_muon(weight_decay=0.3, nesterov=False))
    found = first_divergence(one, other)
    assert found is not None
    # At the first step the momentum is the gradient, with Nesterov and without.
    assert (found.step, found.weight) == (2, "tall")
    assert found.what == "Nesterov: True and False"
    assert first_divergence(one, one) is None


def test_inputs_that_differ_come_before_any_stage(tmp_path):
    one = record_torch(tmp_path / "a.npz", torch_muon())
    found = first_divergence(one, record_torch(tmp_path / "b.npz", torch_muon(), seed=1))
    assert found is not None
    assert (found.step, found.what) == (0, "the starts differ")


def test_safetensors_hold_the_same_trace(tmp_path):
    one = record_torch(tmp_path / "a.npz", torch_muon())
    other = record_torch(tmp_path / "a.safetensors", torch_muon())
    (arrays_of_one, meta), (arrays_of_other, other_meta) = read_file(one), read_file(other)
    assert meta == other_meta
    for name, array in arrays_of_one.items():
        np.testing.assert_array_equal(array, arrays_of_other[name])


def test_safetensors_hold_an_array_that_is_not_row_major(tmp_path):
    recorder = Recorder({"w": np.arange(6.0).reshape(2, 3).T})
    recorder.save(tmp_path / "a.safetensors")
    arrays, _ = read_file(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(arrays["param/w/0"], np.arange(6.0).reshape(2, 3).T)


def test_without_the_library_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    path = tmp_path / "a.safetensors"
    for use in (Recorder({"w": np.ones((2, 3))}).save, read_file):
        with pytest.raises(ModuleNotFoundError, match="pip install safetensors"):
            use(path)
