"""Tier T3: with the kernels JAX and PyTorch make the same update, bit for bit.

On a GPU over 100 steps and a dozen shapes; on the CPU, where Triton's interpreter runs the kernels, on
small shapes over a few steps.
"""

import numpy as np
import pytest

from normuon_core import MatrixLayout
from normuon_core.polynomials import RELAXED_CUBIC
from parity_tests.bitwise import Training, different_bits, train_jax, train_torch
from parity_tests.spectra import SPECTRA

OUT_IN, IN_OUT = MatrixLayout(-1, -2), MatrixLayout(-2, -1)

SMALL = {
    "tall": ((23, 10), OUT_IN),
    "wide, in out": ((10, 23), IN_OUT),
    "split QKV": ((20, 12), MatrixLayout(-1, -2, output_splits=(10, 5, 5))),
    "scan axis in the middle": ((6, 3, 8), MatrixLayout(0, 2)),
    "heads that no stride merges": ((4, 3, 2, 5), MatrixLayout((0, 2), 3)),
}

LARGE = {
    "tall": ((1536, 384), OUT_IN),
    "wide": ((384, 1536), OUT_IN),
    "square": ((512, 512), OUT_IN),
    "ragged": ((1000, 1536), OUT_IN),
    "odd": ((257, 131), IN_OUT),
    "tiny": ((5, 3), OUT_IN),
    "one row": ((1, 64), OUT_IN),
    "batch": ((5, 256, 640), IN_OUT),
    "split QKV": ((448, 320), MatrixLayout(-1, -2, output_splits=(320, 64, 64))),
    "split QKV, in out": ((320, 448), MatrixLayout(-2, -1, output_splits=(320, 64, 64))),
    "scan axis in the middle": ((192, 4, 320), MatrixLayout(0, 2)),
    "heads that no stride merges": ((64, 3, 4, 96), MatrixLayout((0, 2), 3)),
}

FEW = {name: LARGE[name] for name in ("wide", "odd", "split QKV, in out")}

HARD = [*SPECTRA, "gaussian"]

FORMS = {
    "float32": dict(dtype="float32", remainder=False),
    "bfloat16": dict(dtype="bfloat16", remainder=False),
    "bfloat16 with remainder": dict(dtype="bfloat16", remainder=True),
}


def make(shapes, steps, form, spectra=HARD, **keywords) -> Training:
    rng = np.random.default_rng(0)

    def pool(shape):
        batch = int(np.prod(shape[:-2]))
        draws = [
            np.stack([SPECTRA[spectrum](rng, *shape[-2:]) for _ in range(batch)])
            for spectrum in spectra
        ]
        return np.stack(draws).reshape(-1, *shape).astype(np.float32)

    shapes_alone = {name: shape for name, (shape, _) in shapes.items()}
    return Training(
        shapes,
        {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes_alone.items()},
        {name: pool(shape) for name, shape in shapes_alone.items()},
        steps,
        **FORMS[form],
        keywords={"weight_decay": 0.1, **keywords},
    )


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_hundred_steps_on_a_gpu_are_the_same_to_the_bit(form):
    training = make(LARGE, 100, form)
    ours = train_jax(training, backend="triton")
    theirs = train_torch(training, backend="triton", device="cuda")
    assert different_bits(ours, theirs) == {}
    assert all(np.isfinite(np.float32(each.arrays["parameter"])).all() for each in ours.values())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "recipe",
    [
        "muon",
        "normuon_paper",
        "normuon_2026_08",
        "dion_normuon",
        "optax_muon",
        "moonlight",
        "nanochat",
    ],
)
def test_other_recipes_on_a_gpu_are_the_same_to_the_bit(recipe):
    training = make(FEW, 10, "float32", recipe=recipe)
    ours = train_jax(training, backend="triton")
    assert different_bits(ours, train_torch(training, backend="triton", device="cuda")) == {}


@pytest.mark.gpu
def test_the_libraries_own_products_are_not_the_same_to_the_bit():
    training = make(FEW, 1, "float32")
    ours = train_jax(training, backend="xla")
    assert different_bits(ours, train_torch(training, backend="eager", device="cuda"))


@pytest.mark.gpu
def test_a_matrix_has_the_same_bits_whatever_shares_its_stack_on_a_gpu():
    """Each matrix is stepped alone in its stack, and then among one other or many."""
    many = {**FEW, "batch": LARGE["batch"]}
    together = make(many, 3, "float32")
    bounded = make(many, 3, "float32", max_stack_bytes=1)
    assert different_bits(*(train_jax(t, backend="triton") for t in (together, bounded))) == {}


@pytest.mark.parametrize(
    ("names", "keywords"),
    [
        (SMALL, {}),
        (
            ("tall", "wide, in out", "split QKV"),
            {"recipe": "nanochat", "coefficients": RELAXED_CUBIC[:1]},
        ),
    ],
    ids=["normuon", "nanochat, a cubic"],
)
def test_interpreted_steps_are_the_same_to_the_bit(names, keywords, interpreted):
    shapes = {name: SMALL[name] for name in names}
    training = make(shapes, 2, "float32", compute_dtype=None, algorithm="gram", **keywords)
    ours = train_jax(training, backend="triton")
    assert different_bits(ours, train_torch(training, backend="triton", device="cpu")) == {}
    other = make(shapes, 2, "float32", algorithm="gram", **{"weight_decay": 0.2, **keywords})
    assert different_bits(ours, train_torch(other, backend="triton", device="cpu"))
