"""The snippets of docs/migration.md, run as they stand there: the new call repeats the old one.

Only the precision is changed, to float64, so that another update cannot hide behind rounding.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from parity_tests import oracle
from parity_tests.compare import infinity_distance
from parity_tests.traces import GOLDEN, load_trace

PAGE = Path(__file__).parents[1] / "docs" / "migration.md"
STEPS = 6
EMBEDDING, SCALE = ("embed", "embedding"), ("norm", "scale")
Weights = dict[str, np.ndarray]
"""(STEPS + 1, *shape) or (STEPS, *shape) by name; matrices are (out, in)."""


def snippets() -> dict[str, str]:
    """The page's code blocks by their heading and first line: `dion: new, JAX`."""
    found = {}
    for section in PAGE.read_text().split("\n## ")[1:]:
        heading = section.split("\n")[0]
        for kind, code in re.findall(r"```python\n# (.*?)\n(.*?)```", section, re.DOTALL):
            found[f"{heading}: {kind}"] = code
    return found


SNIPPETS = snippets()


def run_snippet(name: str, **given: Any) -> dict[str, Any]:
    """What a block defines, in float64, for parameters of those names."""
    code = SNIPPETS[name]
    for dtype in ("jnp.float32", "jnp.bfloat16", "torch.bfloat16"):
        code = code.replace(
            f"compute_dtype={dtype}", f"compute_dtype={dtype.split('.')[0]}.float64"
        )
    names = dict(given)
    exec(code, names)
    return names


def start_of_the_rest() -> tuple[Weights, Weights]:
    """First values and gradients of an embedding and a scale."""
    random = np.random.default_rng(0)
    shapes = {"embedding": (7, 4), "scale": (6,)}
    return (
        {name: random.standard_normal(shape) for name, shape in shapes.items()},
        {name: random.standard_normal((STEPS, *shape)) for name, shape in shapes.items()},
    )


def weights_of_a_trace(name: str) -> tuple[Weights, Weights]:
    """A golden trace's weights that are plain matrices, (out, in), and their gradients."""
    trace = load_trace(GOLDEN / f"{name}__a.npz")
    chosen = [weight for weight in trace.weights if weight.name in ("tall", "wide", "square")]
    sides = [weight.params.shape[-2:] for weight in chosen]
    assert len(chosen) == 3
    return (
        {w.name: w.params.reshape(-1, *side) for w, side in zip(chosen, sides, strict=True)},
        {w.name: w.grads.reshape(-1, *side) for w, side in zip(chosen, sides, strict=True)},
    )


def as_tree(weights: Weights) -> Any:
    """Kernels (in, out) in a Flax tree."""
    tree: dict[str, Any] = {"block": {}}
    for name, value in weights.items():
        if name == "embedding":
            tree["embed"] = {"embedding": jnp.asarray(value)}
        elif name == "scale":
            tree["norm"] = {"scale": jnp.asarray(value)}
        else:
            tree["block"][name] = {"kernel": jnp.asarray(value.T)}
    return tree


def from_tree(tree: Any) -> Weights:
    kernels = {name: np.asarray(of["kernel"]).T for name, of in tree["block"].items()}
    rest = {name: np.asarray(v) for part in ("embed", "norm") for name, v in tree[part].items()}
    return {**kernels, **rest}


def train_tree(tx, params: Any, gradients: list[Any]) -> list[Any]:
    """Parameters after each step."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state, update, after = tx.init(params), jax.jit(tx.update), []
        for each in gradients:
            updates, state = update(each, state, params)
            params = optax.apply_updates(params, updates)
            after.append(params)
    return after


def train_jax(tx, start: Weights, grads: Weights) -> Weights:
    gradients = [as_tree({name: of[t] for name, of in grads.items()}) for t in range(STEPS)]
    after = [from_tree(params) for params in train_tree(tx, as_tree(start), gradients)]
    return {name: np.stack([params[name] for params in after]) for name in start}


class TorchModel:
    """Parameters by name, and what a snippet calls `matrices` and `others`."""

    def __init__(self, start: Weights):
        self.params = {k: torch.nn.Parameter(torch.tensor(value)) for k, value in start.items()}
        rest = ("embedding", "scale")
        self.given = {
            "matrices": [p for name, p in self.params.items() if name not in rest],
            "others": [self.params[name] for name in rest],
        }

    def train(self, optimizers: list[torch.optim.Optimizer], grads: Weights) -> Weights:
        after: dict[str, list[np.ndarray]] = {name: [] for name in self.params}
        for t in range(STEPS):
            for name, param in self.params.items():
                param.grad = torch.tensor(grads[name][t])
            for optimizer in optimizers:
                optimizer.step()
            for name, param in self.params.items():
                after[name].append(param.detach().numpy().copy())
        return {name: np.stack(steps) for name, steps in after.items()}


def adamw(start: Weights, grads: Weights, **rates: float) -> Weights:
    after = {}
    for name, param in start.items():
        state, steps = oracle.AdamState(), []
        for gradient in grads[name]:
            param = oracle.adamw(param, gradient, state, **rates)
            steps.append(param)
        after[name] = np.stack(steps)
    return after


def new(name: str, start: Weights, grads: Weights) -> Weights:
    """The steps of the optimizer that a block makes."""
    if "PyTorch" in name:
        model = TorchModel(start)
        return model.train([run_snippet(name, **model.given)["optimizer"]], grads)
    return train_jax(run_snippet(name)["tx"], start, grads)


def largest_distance(actual: Weights, expected: Weights) -> float:
    """The largest relative distance of any weight after any step."""
    assert set(actual) == set(expected)
    return max(
        infinity_distance(mine, theirs)
        for name in expected
        for mine, theirs in zip(actual[name], expected[name], strict=True)
    )


def both_halves(trace: str) -> tuple[Weights, Weights, Weights]:
    """First values, gradients, and what the original made of the matrices."""
    params, grads = weights_of_a_trace(trace)
    rest, rest_grads = start_of_the_rest()
    start = {**{name: values[0] for name, values in params.items()}, **rest}
    return start, {**grads, **rest_grads}, {name: v[1:] for name, v in params.items()}


# The hyperparameters of the AdamW that each original has for the rest.
BESIDE = {
    "KellerJordan/Muon": dict(lr=3e-4, b1=0.9, b2=0.95, eps=1e-10, weight_decay=0.01),
    "dion": dict(lr=3e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1),
    "nanochat": dict(lr=3e-3, b1=0.8, b2=0.96, eps=1e-10, weight_decay=0.01),
}
OF_TRACES = [
    ("KellerJordan/Muon: new, PyTorch", "muon_keller"),
    ("KellerJordan/Muon: new, JAX", "muon_keller"),
    ("dion: new, PyTorch", "dion_normuon"),
    ("dion: new, JAX", "dion_normuon"),
    ("nanochat: new, PyTorch", "nanochat"),
    ("nanochat: new, JAX", "nanochat"),
    ("modded-nanogpt (matrices): new, JAX, 2024-10", "muon_2024_10"),
    ("modded-nanogpt (matrices): new, JAX, 2025-11", "normuon_2025_11"),
    ("modded-nanogpt (matrices): new, JAX, 2025-12", "normuon_2025_12"),
    ("modded-nanogpt (matrices): new, JAX, 2026-08", "normuon_2026_08"),
]


@pytest.mark.parametrize(("name", "trace"), OF_TRACES)
@pytest.mark.usefixtures("x64")
def test_the_new_call_repeats_the_trace_of_the_original_and_its_adamw(name, trace):
    """Largest distance: 9.7e-16."""
    start, grads, expected = both_halves(trace)
    actual = new(name, start, grads)
    origin = name.split(": ")[0]
    rest = {key: start[key] for key in ("embedding", "scale")}
    if origin in BESIDE:
        expected |= adamw(rest, grads, **BESIDE[origin])
    else:
        actual = {key: actual[key] for key in expected}
    assert largest_distance(actual, expected) <= 1e-11


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("origin", ["optax.contrib.muon", "MaxText (matrices)"])
def test_the_new_call_repeats_optax(origin):
    """Largest distance: 2.8e-16."""
    if origin == "optax.contrib.muon":
        start, grads, _ = both_halves("muon_keller")
        trees = as_tree(start), [as_tree({k: g[t] for k, g in grads.items()}) for t in range(STEPS)]
    else:
        trees = scanned_layers(0), [scanned_layers(t + 1) for t in range(STEPS)]
    old, mine = (train_tree(run_snippet(f"{origin}: {kind}")["tx"], *trees) for kind in KINDS)
    for theirs, ours in zip(old, mine, strict=True):
        jax.tree.map(lambda a, b: check(infinity_distance(b, a)), theirs, ours)


KINDS = ("old", "new, JAX")


def check(distance: float) -> None:
    assert distance <= 1e-11


def scanned_layers(seed: int) -> Any:
    """Two layers on axis 1, as MaxText stores them."""
    random = np.random.default_rng(seed)

    def kernel(*shape):
        return {"kernel": jnp.asarray(random.standard_normal(shape))}

    return {
        "mlp": {"wi": kernel(6, 2, 8)},
        "self_attention": {"query": kernel(6, 2, 3, 2), "out": kernel(3, 2, 2, 6)},
        "norm": {"scale": jnp.asarray(random.standard_normal((6, 2)))},
    }


@pytest.mark.parametrize("kind", ["new, PyTorch", "new, JAX"])
@pytest.mark.usefixtures("x64")
def test_the_new_call_repeats_torch(monkeypatch, kind):
    """Largest distance: 4.6e-16."""
    start, grads, _ = both_halves("muon_keller")
    origin, model = "torch.optim.Muon and torch.optim.AdamW", TorchModel(start)
    made = run_snippet(f"{origin}: old", **model.given)
    with monkeypatch.context() as patch:
        # PyTorch's Muon iterates in bfloat16 whatever it is given; its in-place division needs a copy.
        patch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())
        expected = model.train([made["muon"], made["adamw"]], grads)
    assert largest_distance(new(f"{origin}: {kind}", start, grads), expected) <= 1e-11


def test_every_new_call_of_the_page_is_run():
    run = {name for name, _ in OF_TRACES}
    run |= {f"{origin}: new, JAX" for origin in ("optax.contrib.muon", "MaxText (matrices)")}
    run |= {f"torch.optim.Muon and torch.optim.AdamW: new, {kind}" for kind in ("PyTorch", "JAX")}
    assert {name for name in SNIPPETS if ": new" in name} == run


def test_an_old_call_is_run_or_says_what_it_needs():
    installed = {
        "optax.contrib.muon",
        "torch.optim.Muon and torch.optim.AdamW",
        "MaxText (matrices)",
    }
    run = {f"{origin}: old" for origin in installed}
    for name in SNIPPETS.keys() - run:
        compile(SNIPPETS[name], name, "exec")
    old = {name for name in SNIPPETS if ": old" in name}
    assert {name for name in old if "# needs " in SNIPPETS[name]} == old - run
