"""The kernels against float64: products against the exact ones, steps against the oracle.

On a GPU where there is one, else by Triton's interpreter.
"""

from dataclasses import replace

import jax
import numpy as np
import pytest
import torch

import torch_ref
from normuon_core import RECIPES, MatrixLayout, NormSetting, Recipe, RowEquilibration
from normuon_core.kernels import geometry
from normuon_core.kernels.products import KernelProducts
from normuon_core.kernels_support import kernels_support
from parity_tests import oracle
from parity_tests.compare import frobenius_distance, infinity_distance
from parity_tests.covering import covering
from parity_tests.half_precision import HARD_SPECTRA
from torch_ref import NorMuon
from torch_ref.kernels import launcher

DEVICE = torch.device("cuda" if jax.default_backend() == "gpu" else "cpu")

OUT_IN, IN_OUT = MatrixLayout(-1, -2), MatrixLayout(-2, -1)


@pytest.fixture
def nan_everywhere(monkeypatch):
    """Memory that nobody has written holds NaN."""
    empty = torch.empty

    def filled(*args, **keywords):
        tensor = empty(*args, **keywords)
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)


def commuting(rng, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two stacks of symmetric matrices whose products are exactly symmetric: circulants, permuted.

    Entries are whole 64ths, which float16 holds.
    """
    circle = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    circle = np.minimum(circle, size - circle)
    order = rng.permutation(size)
    first_rows = rng.integers(-64, 65, (2, count, size // 2 + 1)) / 64
    s, t = first_rows[:, :, circle[np.ix_(order, order)]]
    return s, t


class Stack:
    """A stack of matrices in a kernel's dtype, as NumPy holds it and as the kernels take it."""

    def __init__(self, values: np.ndarray, dtype: torch.dtype):
        self.plain = torch.tensor(values, dtype=dtype, device=DEVICE)
        self.exact = self.plain.double()
        *sides, columns = values.shape
        self.padded = torch.full(
            (*sides, geometry.padded(columns)), torch.nan, dtype=dtype, device=DEVICE
        )
        self.padded[..., :columns] = self.plain


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("sides", [(40, 72), (70, 136), (130, 257)], ids=str)
@pytest.mark.usefixtures("nan_everywhere")
def test_a_product_is_as_exact_as_one_rounded_once(sides, dtype):
    """Error against float64 over that of torch's product, on ragged sizes between NaN.

    Largest ratio: float16 1.0000, float32 0.89.
    """
    rows, columns = sides
    rng = np.random.default_rng(0)
    kind = getattr(torch, dtype)
    x = Stack(rng.standard_normal((2, rows, columns)), kind)
    s, t = (Stack(values, kind) for values in commuting(rng, 2, rows))
    eye = torch.eye(rows, dtype=torch.float64, device=DEVICE)
    products = KernelProducts(
        launcher.launch, launcher.describe_device(DEVICE), 2, rows, columns, dtype
    )
    multiply, product = products.multiply, torch_ref.product
    st = s.exact @ t.exact
    cases = {
        "gram": (
            products.gram(x.padded, alpha=0.7),
            product(x.plain, x.plain.mT, alpha=0.7),
            0.7 * x.exact @ x.exact.mT,
        ),
        "multiply": (
            multiply(s.padded, t.padded, alpha=0.7),
            product(s.plain, t.plain, alpha=0.7),
            0.7 * st,
        ),
        "multiply, an addend": (
            multiply(s.padded, t.padded, alpha=0.7, addends=[(t.padded, 1.3)]),
            product(s.plain, t.plain, t.plain, alpha=0.7, beta=1.3),
            0.7 * st + 1.3 * t.exact,
        ),
        "multiply, two addends and a diagonal": (
            multiply(
                s.padded,
                t.padded,
                alpha=0.7,
                addends=[(t.padded, 1.3), (s.padded, -0.4)],
                diagonal=20.0,
            ),
            product(
                s.plain, t.plain, t.plain, s.plain, alpha=0.7, beta=1.3, gamma=-0.4, diagonal=20.0
            ),
            0.7 * st + 1.3 * t.exact - 0.4 * s.exact + 20 * eye,
        ),
        "apply": (
            products.apply(s.padded, x.padded, alpha=0.7),
            product(s.plain, x.plain, alpha=0.7),
            0.7 * s.exact @ x.exact,
        ),
        "apply, an addend": (
            products.apply(s.padded, x.padded, alpha=0.7, addend=1.2),
            product(s.plain, x.plain, x.plain, alpha=0.7, beta=1.2),
            0.7 * s.exact @ x.exact + 1.2 * x.exact,
        ),
    }
    for name, (ours, theirs, exact) in cases.items():
        ours = ours[..., : exact.shape[-1]]
        assert ours.dtype == kind
        if not name.startswith("apply"):
            assert torch.equal(ours, ours.mT), name
        errors = [frobenius_distance(y.double().cpu(), exact.cpu()) for y in (ours, theirs)]
        assert errors[0] <= 1.01 * errors[1], (name, errors)


def test_a_product_declared_symmetric_comes_out_exactly_symmetric():
    """In a step the factors S and T commute up to rounding; these two do not commute at all.

    The kernel computes S T below the diagonal and mirrors it."""
    rng = np.random.default_rng(0)
    s, t = (x + x.swapaxes(1, 2) for x in rng.standard_normal((2, 2, 150, 150)))
    s, t = Stack(s, torch.float16), Stack(t, torch.float16)
    products = KernelProducts(
        launcher.launch, launcher.describe_device(DEVICE), 2, 150, 150, "float16"
    )
    found = products.multiply(s.padded, t.padded, alpha=0.1)[..., :150]
    assert torch.equal(found, found.mT)
    wanted = torch_ref.product(s.plain, t.plain, alpha=0.1)
    # Measured: 1.2e-5, because a few entries are rounded the other way.
    assert frobenius_distance(found.tril().double().cpu(), wanted.tril().double().cpu()) < 5e-5
    assert not torch.equal(wanted, wanted.mT)


LAYOUTS = {
    "tall": ((23, 10), OUT_IN),
    "wide": ((10, 23), OUT_IN),
    "wide, in out": ((10, 23), IN_OUT),
    "square, in out": ((9, 9), IN_OUT),
    "several tiles": ((70, 197), OUT_IN),
    "stack": ((3, 23, 10), OUT_IN),
    "split QKV": ((40, 12), MatrixLayout(-1, -2, output_splits=(23, 10, 7))),
    "split stack, in out": ((2, 10, 38), MatrixLayout(-2, -1, output_splits=(23, 15))),
    "scan axis in the middle": ((10, 3, 23), MatrixLayout(0, 2)),
    "scan axis in the middle, out first": ((23, 3, 10), MatrixLayout(2, 0)),
    "heads that no stride merges": ((5, 3, 2, 23), MatrixLayout((0, 2), 3)),
    "many neurons": ((300, 3), OUT_IN),
    "many inputs": ((3, 1100), OUT_IN),
}
"""Shapes and layouts. Matrices of 10 by 23 share a stack, whichever weight they come from."""

FEW = ("wide", "split QKV")

SPECTRA = ("gaussian", "one huge row")
"""Of the gradients, one a step."""

LR, WEIGHT_DECAY = 0.05, 0.3

BOUND = 8e-6
"""Relative infinity norm: four times the largest measured, 1.9e-6 ("many neurons"; else 9.2e-7)."""


def short(recipe: str) -> Recipe:
    """The recipe with two steps of its polynomial, because the interpreter is slow."""
    polar = RECIPES[recipe].polar
    return replace(RECIPES[recipe], polar=replace(polar, coefficients=polar.coefficients[:2]))


NORMUON = short("normuon")


def draw(names=tuple(LAYOUTS), spectra=SPECTRA) -> dict[str, np.ndarray]:
    """For each weight (steps, *shape) float32, every step of another spectrum."""
    rng = np.random.default_rng(0)
    result = {}
    for name in names:
        *batch, rows, columns = LAYOUTS[name][0]
        steps = [
            [HARD_SPECTRA[spectrum](rng, rows, columns) for _ in range(np.prod(batch, dtype=int))]
            for spectrum in spectra
        ]
        result[name] = np.reshape(steps, (len(spectra), *batch, rows, columns)).astype(np.float32)
    return result


def start(name: str) -> np.ndarray:
    """Weights of which a third are exactly zero, as the cautious mask's equality needs them."""
    rng, shape = np.random.default_rng(1), LAYOUTS[name][0]
    return np.where(rng.random(shape) < 1 / 3, 0.0, rng.standard_normal(shape)).astype(np.float32)


def multipliers(name: str) -> dict[str, np.ndarray | float]:
    """Another rate and decay for every matrix of a weight."""
    shape, layout = LAYOUTS[name]
    matrices = layout.on(shape).batch_shape
    if not matrices:
        return {"lr_mul": 1.5, "wd_mul": 0.5}
    spread = np.linspace(0.5, 2.0, np.prod(matrices)).reshape(matrices)
    return {"lr_mul": spread, "wd_mul": spread[::-1].copy()}


def train(recipe: Recipe, gradients, **keywords) -> dict[str, np.ndarray]:
    """The weights after the kernels' steps, computed in float32."""
    params = {
        name: torch.nn.Parameter(torch.tensor(start(name), device=DEVICE)) for name in gradients
    }
    groups = [
        {"params": [param], "layout": LAYOUTS[name][1], **multipliers(name)}
        for name, param in params.items()
    ]
    settings = {"weight_decay": WEIGHT_DECAY, "compute_dtype": torch.float32, **keywords}
    optimizer = NorMuon(groups, LR, recipe=recipe, backend="triton", **settings)
    for step in range(len(next(iter(gradients.values())))):
        for name, param in params.items():
            param.grad = torch.tensor(gradients[name][step], device=DEVICE)
        optimizer.step()
    return {name: param.detach().cpu().numpy() for name, param in params.items()}


def train_oracle(recipe: Recipe, gradients) -> dict[str, np.ndarray]:
    """The weights after the oracle's steps."""
    result = {}
    for name, steps in gradients.items():
        state, p = oracle.WeightState(), start(name).astype(np.float64)
        for g in steps.astype(np.float64):
            p = oracle.step_weight(
                recipe,
                LAYOUTS[name][1],
                p,
                g,
                state,
                lr=LR,
                weight_decay=WEIGHT_DECAY,
                **multipliers(name),
            )
        result[name] = p
    return result


def largest_distance(actual, expected) -> float:
    return max(infinity_distance(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "recipe", covering(name for name in RECIPES if kernels_support(RECIPES[name]))
)
def test_every_rule_agrees_with_the_oracle(recipe):
    gradients = draw(FEW)
    wanted = train_oracle(short(recipe), gradients)
    assert largest_distance(train(short(recipe), gradients), wanted) <= BOUND


SIDES = ("tall", "wide, in out", "several tiles", "split stack, in out", "many neurons")
"""Rows on either side of a matrix, and more of them than a program of `row_factors` takes at a time."""


@pytest.mark.parametrize(
    ("name", "recipe"),
    [*((name, "normuon") for name in LAYOUTS), *((name, "nanochat") for name in SIDES)],
)
def test_every_layout_agrees_with_the_oracle(name, recipe):
    gradients = draw([name])
    wanted = train_oracle(short(recipe), gradients)
    assert largest_distance(train(short(recipe), gradients), wanted) <= BOUND


@pytest.mark.parametrize(
    "stage",
    [
        dict(row_equilibration=RowEquilibration(0.5)),
        dict(row_equilibration=RowEquilibration(0.5), norm_setting=NormSetting(4.0)),
        dict(norm_setting=NormSetting(4.0)),
    ],
    ids=["rows", "both", "norm"],
)
def test_floors_of_rows_and_norms_that_are_felt_agree_with_the_oracle(stage):
    """Without a neuron norm, which would make up for a factor of the whole matrix."""
    gradients, recipe = draw(["wide"]), replace(short("muon_keller"), **stage)
    assert largest_distance(train(recipe, gradients), train_oracle(recipe, gradients)) <= BOUND


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
@pytest.mark.parametrize("name", ["polar_express", "relaxed_cubic"])
def test_whole_polynomials_agree_with_the_oracle(name, algorithm):
    gradients, recipe = draw(["tall"]), RECIPES["normuon"].override(coefficients=name)
    ours = train(recipe, gradients, algorithm=algorithm)
    assert largest_distance(ours, train_oracle(recipe, gradients)) <= BOUND


@pytest.mark.parametrize("spectrum", ["times 1e8", "times 1e-8", "zero"])
@pytest.mark.parametrize("recipe", ["normuon", "normuon_paper", "torch_muon"])
def test_huge_tiny_and_zero_gradients_agree_with_the_oracle(recipe, spectrum):
    gradients = draw(["split QKV"], (spectrum,) * 2)
    wanted = train_oracle(short(recipe), gradients)
    assert largest_distance(train(short(recipe), gradients), wanted) <= BOUND


@pytest.mark.parametrize(
    "recipe",
    ["normuon", "normuon_paper", "normuon_official", "dion_normuon", "torch_muon", "nanochat"],
)
def test_a_zero_gradient_is_a_zero_update_under_decay(recipe):
    gradients = draw(["stack"], ("zero",))
    untouched = train(short(recipe), gradients, weight_decay=0.0)["stack"]
    np.testing.assert_array_equal(untouched, start("stack"))
    decayed = train(short(recipe), gradients)["stack"]
    assert (np.abs(decayed) < np.abs(start("stack")))[start("stack") != 0].all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("recipe", "bad"),
    [("normuon", np.nan), ("normuon", np.inf), ("normuon_paper", np.nan), ("torch_muon", np.nan)],
)
def test_a_bad_gradient_reaches_only_its_own_matrix(recipe, bad):
    """All other matrices, in its stack and in other weights, have the bits of a run without it."""
    gradients = draw(["wide, in out", "stack", "split QKV"])
    clean = train(short(recipe), gradients)
    gradients["stack"][0, 1, 2, 3] = bad
    gradients["split QKV"][1, 25, 4] = bad
    found = train(short(recipe), gradients)
    assert np.isnan(found["stack"][1]).all()
    assert np.isnan(found["split QKV"][23:33]).all()
    found["stack"][1], found["split QKV"][23:33] = clean["stack"][1], clean["split QKV"][23:33]
    for name, expected in clean.items():
        np.testing.assert_array_equal(found[name], expected)


@pytest.mark.parametrize("algorithm", ["standard", "gram"])
def test_memory_beyond_a_ragged_edge_never_reaches_a_result(algorithm, request):
    gradients = draw(["several tiles", "split QKV", "many neurons"])
    clean = train(NORMUON, gradients, algorithm=algorithm)
    request.getfixturevalue("nan_everywhere")
    found = train(NORMUON, gradients, algorithm=algorithm)
    for name, expected in clean.items():
        np.testing.assert_array_equal(found[name], expected)


def test_a_matrix_has_the_same_bits_whatever_shares_its_stack():
    """Each matrix is stepped in a stack of its own, and then with others."""
    gradients = draw(["tall", "split QKV", "heads that no stride merges"])
    alone, together = (train(NORMUON, gradients, max_stack_bytes=bound) for bound in (1, None))
    for name, expected in alone.items():
        np.testing.assert_array_equal(together[name], expected)


def test_a_norm_is_right_when_its_tiles_are_summed_in_fewer_parts(monkeypatch):
    """A matrix of more than 1024 tiles needs this; here eight tiles are summed in three parts."""
    gradients = draw(["several tiles"])
    monkeypatch.setattr(geometry, "MOST_PARTS", 3)
    assert largest_distance(train(NORMUON, gradients), train_oracle(NORMUON, gradients)) <= BOUND
