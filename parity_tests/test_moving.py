"""A run that changes the framework in its middle goes on as it would have, whichever way it goes."""

import dataclasses
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import optax_normuon
import torch_ref
from normuon_core import RECIPES, MatrixLayout
from normuon_core.moving import NameTable, Rule
from parity_tests.compare import infinity_distance
from torch_ref.arrays import as_tensor

HALF = 10


class Model(NamedTuple):
    """How JAX keeps the weights, beside PyTorch."""

    table: NameTable
    layout: dict[str, Any]


OUT_IN, SPLITS = MatrixLayout(-1, -2), (4, 2, 2)

TABLE = NameTable(
    [
        Rule("blocks.{n}.up.weight", "blocks/up/kernel", "out in -> n in out"),
        Rule("qkv.weight", "qkv/kernel", "out in -> in out"),
        Rule("query.weight", "query/kernel", "(heads size) in -> in heads size", {"heads": 2}),
        Rule("square.weight", "square/kernel", "out in -> in out"),
        Rule("embed.weight", "embed/embedding"),
        Rule("norm.weight", "norm/scale"),
    ]
)
SHAPES = {
    **{f"blocks.{n}.up.weight": (6, 4) for n in range(3)},
    "qkv.weight": (8, 5),
    "query.weight": (6, 5),
    "square.weight": (4, 4),
    "embed.weight": (7, 3),
    "norm.weight": (5,),
}
FUSED_SHAPES = {
    **{f"h.{n}.c_attn.weight": (16, 5) for n in range(2)},
    **{f"h.{n}.c_attn.bias": (16,) for n in range(2)},
    "mlp.gate.weight": (3, 5),
    "mlp.up.weight": (3, 5),
}
ADAMW = ("embed.weight", "norm.weight", "h.0.c_attn.bias", "h.1.c_attn.bias")
HEADS = (4, 2, 2)
C_ATTN = MatrixLayout(-1, -2, output_splits=tuple(2 * heads for heads in HEADS))
TORCH = {
    "qkv.weight": MatrixLayout(-1, -2, output_splits=SPLITS),
    **{f"h.{n}.c_attn.weight": C_ATTN for n in range(2)},
}

FLAX = Model(
    TABLE,
    {
        "blocks": {"up": {"kernel": MatrixLayout(-2, -1)}},
        "qkv": {"kernel": MatrixLayout(0, 1, output_splits=SPLITS)},
        "query": {"kernel": MatrixLayout(0, (1, 2))},
        "square": {"kernel": MatrixLayout(0, 1)},
        "embed": None,
        "norm": None,
    },
)
"""A stack of layers in JAX whose layers are apart in PyTorch, a fused projection, a kernel whose heads
are an axis of their own, and two parameters of AdamW."""

PARTS = ("query", "key", "value")

FUSED = Model(
    NameTable(
        [
            Rule(
                "h.{n}.c_attn.weight",
                tuple(f"h/{part}/kernel" for part in PARTS),
                "(heads size) in -> n in heads size",
                cut={"heads": HEADS},
            ),
            Rule(
                "h.{n}.c_attn.bias",
                tuple(f"h/{part}/bias" for part in PARTS),
                "(heads size) -> n heads size",
                cut={"heads": HEADS},
            ),
            Rule(
                ("mlp.gate.weight", "mlp.up.weight"),
                "mlp/gate_up/kernel",
                "out in -> in out",
                cut={"out": (3, 3)},
            ),
        ]
    ),
    {
        "h": {part: {"kernel": MatrixLayout(1, (2, 3)), "bias": None} for part in PARTS},
        "mlp": {"gate_up": {"kernel": MatrixLayout(0, 1, output_splits=2)}},
    },
)
"""A projection that is fused in PyTorch alone, with layers and heads apart in JAX, and one that is fused
in JAX alone."""

ALIKE = Model(
    NameTable(
        [
            Rule("blocks.{n}.up.weight", "blocks/up/weight", "out in -> n out in"),
            *(Rule(f"{name}.weight", f"{name}/weight") for name in ("qkv", "query", "square")),
            *TABLE.rules[-2:],
        ]
    ),
    {
        "blocks": OUT_IN,
        "qkv": MatrixLayout(-1, -2, output_splits=SPLITS),
        "query": OUT_IN,
        "square": OUT_IN,
        "embed": None,
        "norm": None,
    },
)
"""The same weights stored (out, in) in JAX too: bits are promised for equal storage, since a square
matrix that is transposed is iterated on by its other side."""

RECIPE_SETTINGS: dict[str, dict[str, Any]] = {
    "normuon": {},
    "muon": {"momentum": 0.9, "adam_every": 3},
    "normuon_2025_12": {},
    "nanochat": {},
    "normuon_h": {},
    "optax_muon": {},
}


FEW = ("blocks.0.up.weight", "blocks.1.up.weight", "query.weight", "norm.weight")


def draws(dtype: str, names: Iterable[str] = SHAPES) -> list[dict[str, np.ndarray]]:
    """The start, and the gradients of twenty steps."""

    def draw(step: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(step)
        shapes = SHAPES | FUSED_SHAPES
        return {f"parameter/{n}": rng.standard_normal(shapes[n]).astype(dtype) for n in names}

    return [draw(step) for step in range(2 * HALF + 1)]


class TorchRun:
    def __init__(self, arrays, keywords, *, device="cpu"):
        self.params = {
            key.removeprefix("parameter/"): torch.nn.Parameter(as_tensor(array, device))
            for key, array in arrays.items()
        }
        groups = [
            {"params": [param], "layout": TORCH.get(name, OUT_IN)}
            for name, param in self.params.items()
            if name not in ADAMW
        ]
        others = [param for name, param in self.params.items() if name in ADAMW]
        self.optimizer = torch_ref.NorMuon(
            [*groups, {"params": others, "optimizer": "adamw", "weight_decay": 0.2}],
            0.02,
            weight_decay=0.1,
            **keywords,
        )

    def train(self, steps):
        for gradients in steps:
            for name, param in self.params.items():
                gradient = gradients[f"parameter/{name}"]
                param.grad = as_tensor(gradient, param.device)
            self.optimizer.step()

    def save(self):
        return torch_ref.parameters_to_arrays(self.params.items()) | torch_ref.state_to_arrays(
            self.optimizer, self.params.items()
        )

    def load(self, arrays):
        torch_ref.parameters_from_arrays(arrays, self.params.items())
        torch_ref.state_from_arrays(self.optimizer, arrays, self.params.items())
        return self


def tree_of(arrays, table):
    """The parameters as Flax would have them, by their names alone."""
    tree: dict[str, Any] = {}
    for key, array in table.to_flax(arrays).items():
        *way, last = key.removeprefix("parameter/").split("/")
        node = tree
        for part in way:
            node = node.setdefault(part, {})
        node[last] = jnp.asarray(array)
    return tree


class JaxRun:
    def __init__(self, arrays, keywords, *, remainder=False, model=FLAX):
        self.table = model.table
        self.params = tree_of(arrays, self.table)
        layout = {name: model.layout[name] for name in self.params}
        tx = optax_normuon.normuon(
            0.02, weight_decay=0.1, adam_weight_decay=0.2, layout=layout, **keywords
        )
        # A chain, as people have it.
        self.tx = optax.chain(
            optax.identity(), optax_normuon.with_bf16_remainder(tx) if remainder else tx
        )
        self.state = self.tx.init(self.params)

        @jax.jit
        def step(gradients, state, params):
            updates, state = self.tx.update(gradients, state, params)
            with jax.numpy_dtype_promotion("standard"):
                return optax.apply_updates(params, updates), state

        self.step = step

    def train(self, steps):
        for gradients in steps:
            gradients = tree_of(gradients, self.table)
            self.params, self.state = self.step(gradients, self.state, self.params)

    def save(self):
        """Under PyTorch's names."""
        arrays = optax_normuon.parameters_to_arrays(self.params)
        arrays |= optax_normuon.state_to_arrays(self.tx, self.state, self.params)
        return self.table.to_torch(through_a_file(arrays))

    def load(self, arrays):
        arrays = self.table.to_flax(arrays)
        self.params = optax_normuon.parameters_from_arrays(arrays, self.params)
        self.state = optax_normuon.state_from_arrays(self.tx, arrays, self.params)
        return self


def through_a_file(arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    return np.load(file)


def distance(ours, theirs) -> float:
    """The largest distance of two files under PyTorch's names, of any array."""
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert ours[key].dtype == array.dtype, key
    compared = [key for key in theirs if key != "metadata"]
    return max(infinity_distance(ours[key], theirs[key]) for key in compared)


def both_ways(start, steps, make_torch, make_jax):
    """(the run that never moved in PyTorch, in JAX, moved to JAX, moved to PyTorch), under PyTorch's
    names. JAX's functions are compiled once."""
    in_torch, in_jax = make_torch(start), make_jax(start)
    in_torch.train(steps[:HALF])
    in_jax.train(steps[:HALF])
    halves = through_a_file(in_torch.save()), through_a_file(in_jax.save())
    in_torch.train(steps[HALF:])
    in_jax.train(steps[HALF:])
    never = in_torch.save(), in_jax.save()
    to_jax = in_jax.load(halves[0])
    to_jax.train(steps[HALF:])
    to_torch = make_torch(start).load(halves[1])
    to_torch.train(steps[HALF:])
    return *never, to_jax.save(), to_torch.save()


def moved_in_float64(start, steps, of_torch, of_jax, model=FLAX):
    """(PyTorch's run that never moved, the distances from it of JAX's and of the two that moved)."""
    never, *others = both_ways(
        start,
        steps,
        lambda arrays: TorchRun(arrays, {**of_torch, "compute_dtype": torch.float64}),
        lambda arrays: JaxRun(arrays, {**of_jax, "compute_dtype": jnp.float64}, model=model),
    )
    return never, [distance(each, never) for each in others]


@pytest.mark.parametrize("recipe", RECIPE_SETTINGS)
def test_ten_steps_here_and_ten_there_are_twenty_in_either(recipe, x64):
    start, *steps = draws("float64", SHAPES if recipe == "normuon" else FEW)
    keywords = {"recipe": recipe, **RECIPE_SETTINGS[recipe]}
    never, distances = moved_in_float64(start, steps, keywords, keywords)
    # Measured: at most 8.6e-15.
    assert max(distances) < 1e-11, distances
    kinds = {key.partition("/")[0] for key in never}
    assert ("second_moment" in kinds) == (RECIPES[recipe].neuron_norm is not None)
    assert ("radius" in kinds) == recipe.endswith("_h")
    assert ("gradient_sum" in kinds) == ("adam_every" in keywords)
    assert never["count"] == 20


SPHERES = dataclasses.replace(
    RECIPES["normuon_h"],
    neuron_norm=dataclasses.replace(RECIPES["normuon_h"].neuron_norm, axis="longer"),
)
"""With radii, and second moments that are the outputs' in one block and the inputs' in the next."""


def test_what_is_fused_in_one_framework_alone_moves(x64):
    start, *steps = draws("float64", FUSED_SHAPES)
    keywords = {"recipe": SPHERES, "adam_every": 3}
    never, distances = moved_in_float64(start, steps, keywords, keywords, FUSED)
    # Measured: at most 4.2e-15.
    assert max(distances) < 1e-11, distances
    shapes = {key: array.shape for key, array in never.items()}
    assert shapes["second_moment.0/h.0.c_attn.weight"] == (8, 1)
    assert (
        shapes["second_moment.1/h.0.c_attn.weight"]
        == shapes["second_moment/mlp.up.weight"]
        == (1, 5)
    )
    assert shapes["radius/h.0.c_attn.weight"] == (3, 1)
    assert never["gradient_sum/h.0.c_attn.bias"].all()


def test_a_fused_weight_that_was_stepped_whole_does_not_move_to_its_parts(x64, monkeypatch):
    start = draws("float64", FUSED_SHAPES)[0]
    in_jax = JaxRun(start, {}, model=FUSED)
    parts = in_jax.save()
    for n in range(2):
        monkeypatch.setitem(TORCH, f"h.{n}.c_attn.weight", OUT_IN)
    whole = TorchRun(start, {})
    with pytest.raises(ValueError, match=r"one of \(16, 5\), .* other matrices; .* output_splits"):
        in_jax.load(whole.save())
    with pytest.raises(ValueError, match=r"here it is one of \(16, 5\); .*\(output_splits"):
        whole.load(parts)


def test_a_run_with_its_momentum_in_int8_moves(x64):
    start, *steps = draws("float64", ("blocks.0.up.weight", "query.weight"))
    of_torch, of_jax = {"momentum_dtype": torch.int8}, {"momentum_dtype": "int8"}
    _, distances = moved_in_float64(start, steps, of_torch, of_jax)
    # Measured: at most 1.6e-15.
    assert max(distances) < 1e-11, distances


def test_a_run_whose_state_was_left_behind_does_not_go_on(x64):
    start, *steps = draws("float64")
    keywords = {"compute_dtype": torch.float64}
    whole, left = TorchRun(start, keywords), TorchRun(start, keywords)
    whole.train(steps[:HALF])
    torch_ref.parameters_from_arrays(whole.save(), left.params.items())
    for run in (whole, left):
        run.train(steps[HALF:])
    assert distance(left.save(), whole.save()) > 1e-3


@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"momentum_dtype": "bfloat16", "adam_moment_dtype": "bfloat16", "adam_every": 3},
        {"momentum_dtype": "int8"},
    ],
    ids=str,
)
def test_a_bfloat16_run_with_its_remainder_comes_back_bit_for_bit(keywords):
    """The arrays travel unstepped: two frameworks' own products do not share their bits."""
    start, *steps = draws("bfloat16")
    here = TorchRun(start, {"bf16_remainder": True, **in_torch(keywords)})
    here.train(steps[:2])
    saved = here.save()
    moved = JaxRun(start, in_jax(keywords), remainder=True).load(through_a_file(saved))
    assert_bits(moved.save(), saved)
    back = TorchRun(start, {"bf16_remainder": True, **in_torch(keywords)}).load(saved)
    for run in (here, back):
        run.train(steps[2:4])
    assert_bits(back.save(), here.save())
    assert saved["remainder/embed.weight"].dtype == np.uint16
    floats = "bfloat16" if "adam_every" in keywords else "float32"
    assert saved["momentum/qkv.weight"].dtype == saved["exp_avg/embed.weight"].dtype == floats
    if "adam_every" in keywords:
        assert saved["gradient_sum/embed.weight"].dtype == "float32"
        assert saved["gradient_sum/embed.weight"].all()


def in_torch(keywords):
    return {
        key: getattr(torch, value) if "dtype" in key else value for key, value in keywords.items()
    }


def in_jax(keywords):
    return {key: jnp.dtype(value) if "dtype" in key else value for key, value in keywords.items()}


def assert_bits(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key, array in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (array.dtype, array.shape), key
        if key != "metadata":
            bits = f"u{array.dtype.itemsize}"
            np.testing.assert_array_equal(
                np.atleast_1d(ours[key]).view(bits), np.atleast_1d(array).view(bits), key
            )


def assert_moves_bit_for_bit(start, steps, device, keywords):
    """The matrices alone: AdamW's elementwise arithmetic is the compiler's, which may contract it."""
    half = len(steps) // 2
    remainder = start["parameter/norm.weight"].dtype == jnp.bfloat16

    def make_torch(arrays):
        return TorchRun(arrays, {"bf16_remainder": remainder, **keywords}, device=device)

    halves = {}
    first, second = make_torch(start), JaxRun(start, keywords, remainder=remainder, model=ALIKE)
    for run in (first, second):
        run.train(steps[:half])
        halves[run] = through_a_file(run.save())
        run.train(steps[half:])
    wanted = matrices(first.save())
    assert_bits(matrices(second.save()), wanted)
    second.load(halves[first]).train(steps[half:])
    assert_bits(matrices(second.save()), wanted)
    third = make_torch(start).load(halves[second])
    third.train(steps[half:])
    assert_bits(matrices(third.save()), wanted)


def matrices(arrays):
    return {key: array for key, array in arrays.items() if key.rpartition("/")[2] not in ADAMW}


def test_with_interpreted_kernels_a_moved_run_is_the_same_to_the_bit(interpreted):
    start, *steps = draws("float32", ("blocks.0.up.weight", "square.weight", "norm.weight"))
    assert_moves_bit_for_bit(
        start, steps[:2], "cpu", {"backend": "triton", "algorithm": "gram", "steps": 1}
    )


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["normuon", "nanochat", "optax_muon"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_with_the_kernels_a_moved_run_is_the_same_to_the_bit(dtype, recipe):
    start, *steps = draws(dtype)
    assert_moves_bit_for_bit(start, steps, "cuda", {"recipe": recipe, "backend": "triton"})


@pytest.mark.parametrize("scan", [False, True])
def test_the_shipped_gpts_table_is_derived_and_moves_its_logits(scan):
    from examples.gpt import GPTConfig, apply_model, first_parameters
    from examples.torch_gpt import GPT, load_weights, name_table

    config = GPTConfig(width=16, depth=2, heads=2, context=8, vocabulary=11, scan=scan)
    model, params = GPT(config), first_parameters(config, 0)
    load_weights(model, config, params)
    tokens = np.arange(8)[None] % 11
    ours = apply_model(config, params, jnp.asarray(tokens))
    theirs = model(torch.from_numpy(tokens)).detach().numpy()
    # Measured: 1.9e-7.
    assert infinity_distance(theirs, ours) < 2e-6
    arrays = torch_ref.parameters_to_arrays(model.named_parameters())
    assert_bits(name_table(config).to_flax(arrays), optax_normuon.parameters_to_arrays(params))
