"""nGPT: its formulas, its weights on spheres, the recorded preset, and a run of the command."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples.__main__ import main
from examples.configuration import read_config
from examples.errors import BadInput
from examples.gpt import GPTConfig, apply_model, first_parameters, parameter_count
from examples.launch import PHASES
from examples.ngpt import AXES, NGPTConfig, normalized, role_of
from examples.optimizers import make_optimizer
from examples.presets import NGPT, PRETRAIN
from examples.pretrain import Pretrain
from examples.pretrain_ngpt import PretrainNGPT
from examples.runs import read_run
from examples.spheres import SphereConfig
from examples.sweep import presets_of

PRESET = Path(__file__).parents[2] / "examples" / "configs" / "ngpt_record.toml"
SMALL = dict(width=16, depth=2, heads=4, context=12, vocabulary=32)
GATED = dict(
    gated=True,
    alpha=0.15,
    logit_scale=15.0,
    learned_positions=True,
    qk_norm=False,
    activation="gelu",
)
MODELS = {
    "paper": NGPTConfig(**SMALL, kv_heads=2),
    "gated": NGPTConfig(**SMALL, **GATED),
}


def drawn(config: NGPTConfig):
    """First parameters whose scales and gates are different numbers of both signs."""
    rng = np.random.default_rng(1)

    def other(path, p):
        if p.ndim > 1:
            return p
        factors = (rng.uniform(0.5, 1.5, p.shape) * rng.choice([-1, 1], p.shape)).astype(np.float32)
        return factors if path[-1].key == "gate" else p * factors

    return jax.tree_util.tree_map_with_path(other, first_parameters(config, 0))


def unit(x):
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def turned(x):
    """Rotary positions of (time, heads, size)."""
    time, _, size = x.shape
    z = x[..., : size // 2] + 1j * x[..., size // 2 :]
    z = z * np.exp(1j * np.outer(np.arange(time), 1e4 ** (-np.arange(0, size, 2) / size)))[:, None]
    return np.concatenate([z.real, z.imag], -1)


def attention(p, h, config):
    width, size = config.width, config.width // config.heads
    q, k, v = (
        (h @ p[name]["kernel"]).reshape(len(h), -1, size) for name in ("query", "key", "value")
    )
    scale = 1 / math.sqrt(size)
    group = config.heads // k.shape[1]
    if config.qk_norm:
        s = (p["query_key_scale"]["scale"] * math.sqrt(width)).reshape(-1, size)
        q, k = unit(turned(q)) * np.repeat(s, group, 0), unit(turned(k)) * s
        scale = math.sqrt(size)
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    scores = scale * np.einsum("qhd,khd->hqk", q, k)
    scores = np.where(np.tri(len(h), dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(h.shape) @ p["out"]["kernel"]


def mlp(p, h, config):
    u = h @ p["up"]["kernel"]
    if config.activation == "gelu":
        erf = np.vectorize(math.erf)
        return (u * (1 + erf(u / math.sqrt(2))) / 2) @ p["down"]["kernel"]
    u = u * p["up_scale"]["scale"]
    v = (h @ p["gate"]["kernel"]) * p["gate_scale"]["scale"] * math.sqrt(config.width)
    return (u * v / (1 + np.exp(-v))) @ p["down"]["kernel"]


def moved(p, h, branch, config):
    if config.gated:
        return unit(h + p["strength"] / (1 + np.exp(-p["gate"])) * branch)
    alpha = np.abs(p["alpha"]["scale"] * (0.05 * math.sqrt(config.width)))
    return unit(h + alpha * (unit(branch) - h))


def by_numpy(params, tokens, config):
    """Logits (time, vocabulary) of one text, float64: the paper's equations, and the variant's."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    h = p["embed"]["embedding"][tokens]
    if config.learned_positions:
        h = unit(h + p["position"]["embedding"][: len(tokens)])
    for block in p["blocks"].values():
        h = moved(block["attention_residual"], h, attention(block["attention"], h, config), config)
        h = moved(block["mlp_residual"], h, mlp(block["mlp"], h, config), config)
    cosines = h @ p["lm_head"]["kernel"]
    if config.gated:
        return config.logit_scale * cosines
    return cosines * p["logit_scale"]["scale"] * math.sqrt(config.width)


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_the_papers_or_the_variants_formulas(name):
    """Largest difference: 1.1e-6 of a logit, times 15 in the variant."""
    config = MODELS[name]
    params = drawn(config)
    tokens = np.random.default_rng(0).integers(0, 32, (2, 12))
    logits = jax.jit(apply_model, static_argnums=0)(config, params, tokens)
    for row, text in zip(logits, tokens, strict=True):
        np.testing.assert_allclose(row, by_numpy(params, text, config), atol=3e-5)
    assert np.std(logits) > 0.1


def slice_norms(params, axes):
    """The norms of every matrix's slices, by role."""
    return {
        jax.tree_util.keystr(path): np.linalg.norm(leaf, axis=AXES[axes][role_of(path)])
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key in ("kernel", "embedding")
    }


@jax.numpy_dtype_promotion("standard")  # Optax's Adam promotes its step count
def after(optimizer: SphereConfig, params, steps: int):
    tx = make_optimizer(optimizer, 100).tx
    state, step = tx.init(params), jax.jit(tx.update)
    for seed in range(steps):
        rng = np.random.default_rng(seed)
        draw = functools.partial(rng.standard_normal, dtype=np.float32)
        gradients = jax.tree.map(lambda p, draw=draw: draw(p.shape), params)
        updates, state = step(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return params


RATES = dict(learning_rate=0.05, adam_learning_rate=0.05)
STEPS = {
    "projection": SphereConfig("adamw", **RATES, path="projection", weight_decay=0.1),
    "geodesic": SphereConfig("normuon", **RATES, path="geodesic", weight_decay=0.1),
    "retraction": SphereConfig("muon", **RATES, path="retraction", angle="rate"),
    "record's axes": SphereConfig("muon", **RATES, path="projection", axes="inputs"),
}


@pytest.mark.parametrize("name", STEPS)
def test_slices_of_all_matrices_are_unit_vectors_at_first_and_after_steps(name):
    """Largest distance from 1: 1.8e-7."""
    config = NGPTConfig(**SMALL, learned_positions=True, scan=name == "geodesic")
    params = first_parameters(config, 0)
    for norms in slice_norms(params, "embedding").values():
        np.testing.assert_allclose(norms, 1, atol=1e-6)
    trained = after(STEPS[name], params, 2)
    found = slice_norms(trained, STEPS[name].axes)
    assert len(found) == 3 + (7 if config.scan else 14)
    for norms in found.values():
        np.testing.assert_allclose(norms, 1, atol=1e-6)
    moved = jax.tree.map(lambda p, q: np.abs(p - q).max(), params, trained)
    assert min(jax.tree.leaves(moved)) > 1e-3


def test_a_hyperball_keeps_the_norms_of_the_blocks_matrices():
    config = NGPTConfig(**SMALL)
    params = first_parameters(config, 0)
    trained = after(SphereConfig("normuon", **RATES, path="hyperball"), params, 2)
    for block in (params, trained):
        norm = np.linalg.norm(block["blocks"][0]["mlp"]["down"]["kernel"])
        np.testing.assert_allclose(norm, math.sqrt(64), rtol=1e-6)
    assert (
        np.ptp(slice_norms(trained, "embedding")["['blocks'][0]['mlp']['down']['kernel']"]) > 0.01
    )
    head = np.linalg.norm(trained["lm_head"]["kernel"], axis=0)
    np.testing.assert_allclose(head, 1, atol=1e-6)


def test_a_lazy_projection_comes_with_the_first_and_every_kth_step():
    lazy = SphereConfig("muon", **RATES, path="projection", project_every=3)
    params = first_parameters(NGPTConfig(**SMALL), 0)
    off = []
    for steps in (1, 2, 3, 4):
        norms = slice_norms(after(lazy, params, steps), "embedding").values()
        off.append(max(np.abs(each - 1).max() for each in norms))
    assert max(off[0], off[3]) < 1e-6
    assert min(off[1], off[2]) > 1e-3


def test_a_scale_moves_by_the_adam_rate_times_its_first_value_over_what_is_kept():
    """A first step of Adam has the size of the rate."""
    config = NGPTConfig(**SMALL)
    rate, width = 1e-3, config.width
    params = first_parameters(config, 0)
    moved = after(SphereConfig("adamw", learning_rate=rate, adam_learning_rate=rate), params, 1)
    scales = {
        ("blocks", 0, "attention", "query_key_scale"): (1.0, math.sqrt(width)),
        ("blocks", 1, "attention_residual", "alpha"): (0.05, 0.05 * math.sqrt(width)),
        ("blocks", 1, "mlp", "gate_scale"): (1.0, 1.0),
        ("logit_scale",): (1.0, math.sqrt(width)),
    }
    for path, (first, factor) in scales.items():
        before, behind = params, moved
        for name in path:
            before, behind = before[name], behind[name]
        np.testing.assert_allclose(before["scale"] * factor, first, rtol=1e-6)
        change = np.abs(behind["scale"] - before["scale"]) * factor
        np.testing.assert_allclose(change, rate * factor, rtol=1e-3)


def test_normalizing_keeps_zeros_and_their_gradient_is_finite():
    x = jnp.asarray([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(normalized(x), [[0.6, 0.8], [0, 0]], rtol=1e-6)
    assert np.isfinite(jax.grad(lambda x: normalized(x).sum())(x)).all()


def test_the_preset_is_what_was_run_on_record():
    config = read_config(PRESET, PHASES["ngpt"])
    model, optimizer, training = config.model, config.optimizer, config.training
    assert (model.depth, model.width, model.heads, model.context) == (11, 768, 6, 128)
    assert {name: getattr(model, name) for name in GATED} == GATED
    assert parameter_count(model) == 155_166_743 - 1  # the fixed scale of the logits was counted
    assert (training.steps, training.batch) == (400, 32)
    assert (optimizer.optimizer, optimizer.path, optimizer.project_every) == (
        "adamw",
        "projection",
        7,
    )
    assert optimizer.adam_learning_rate == pytest.approx(0.3 * optimizer.learning_rate)
    followed = make_optimizer(optimizer, 400).followed
    for step in (0, 200, 399):
        assert followed["lr_matrices"](step) == pytest.approx(5e-4)


@jax.numpy_dtype_promotion("standard")
def test_the_command_trains_resumes_and_samples_and_other_phases_refuse_its_model(tmp_path, capsys):
    (tmp_path / "text").mkdir()
    for i in range(20):
        (tmp_path / "text" / f"{i}.txt").write_text(
            "the cat sat on the mat, the dog on the log. " * 20
        )
    run = tmp_path / "run"
    told = (
        f"ngpt --data {tmp_path / 'text'} --output {run} --width 16 --depth 1 --heads 2 --context 16"
        " --scan True --steps 40 --batch 8 --evaluate-every 40 --evaluation-batches 2 --samples 1"
        " --adam-learning-rate 0.03"
    )
    assert main(told.split(" ")) == 0
    found = read_run(run)
    first, last = found.evaluations[0].validation_loss, found.evaluations[-1].validation_loss
    assert abs(first - math.log(256)) < 0.2  # the first logits are cosines
    assert last < first - 1
    assert {"lr_matrices", "lr_adamw", "momentum"} < set(found.lines[1])
    assert main(["resume", str(run)]) == 0
    assert main(["sample", str(run), "--prompt", "the ", "--tokens", "4"]) == 0
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "a", "answer": "b"}\n' * 20)
    assert main(["sft", str(run), "--data", str(rows)]) == 2
    assert "is an nGPT" in capsys.readouterr().err


def test_an_optimizer_without_a_direction_here_is_refused():
    with pytest.raises(BadInput, match="choose adamw, muon, normuon"):
        SphereConfig(optimizer="moonlight")
    with pytest.raises(BadInput, match="project_every=0"):
        SphereConfig(project_every=0)


def test_a_sweep_of_ngpt_is_around_its_own_presets():
    assert presets_of(PretrainNGPT()) == (NGPT, NGPTConfig().width)
    assert presets_of(Pretrain()) == (PRETRAIN, GPTConfig().width)
