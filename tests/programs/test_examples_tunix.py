"""Our losses and gradients of fine-tuning are Tunix's, and its trainers take our optimizer.

Tunix is no dependency (106 packages): `pip install google-tunix` in an environment of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

pytest.importorskip("tunix", reason="Tunix is not installed")
from tunix.sft import peft_trainer
from tunix.sft.dpo import dpo_trainer

from examples.gpt import GPT, GPTConfig
from examples.losses import next_token, preference
from optax_normuon import normuon

MODEL = GPTConfig(width=32, depth=1, heads=2, context=16, vocabulary=32)
PROMPT, ANSWER, BATCH, BETA = 5, 8, 4, 0.3


class AsTunixCallsIt(nnx.Module):
    """(tokens, positions, cache, attention mask) to (logits, cache); ours is causal by itself."""

    def __init__(self, model: GPT):
        self.model = model

    def __call__(self, tokens, positions, cache, attention_mask):
        del positions, attention_mask
        return self.model(tokens), cache


@pytest.fixture(autouse=True)
def promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def model(seed):
    return AsTunixCallsIt(GPT(MODEL, rngs=nnx.Rngs(seed)))


def forward(model, tokens, segments=None):
    return model.model(tokens, segments)


def pairs():
    """Prompts without padding, answers of several lengths."""
    generator = np.random.default_rng(0)
    draw = lambda *shape: generator.integers(0, 32, shape)  # noqa: E731
    mask = (np.arange(ANSWER) < generator.integers(2, ANSWER + 1, (BATCH, 2, 1))).astype(np.int32)
    return draw(BATCH, PROMPT), draw(BATCH, 2, ANSWER), mask


def equal_trees(one, other, atol):
    flat = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    assert all(np.abs(np.asarray(a) - np.asarray(b)).max() < atol for a, b in flat)


def test_the_loss_of_fine_tuning_and_its_gradient():
    generator = np.random.default_rng(0)
    tokens = jnp.asarray(generator.integers(0, 32, (BATCH, 14)))
    mask = jnp.asarray(generator.integers(0, 2, (BATCH, 14)))

    def theirs(model):
        return peft_trainer._default_loss_fn(model, tokens, mask, None, None)

    def ours(model):
        sums = next_token(forward, model, None, {"tokens": tokens, "weights": mask})
        return sums["loss"] / sums["weight"]

    expected, their_gradient = nnx.value_and_grad(theirs)(model(0))
    loss, gradient = nnx.value_and_grad(ours)(model(0))
    np.testing.assert_allclose(loss, expected, atol=1e-6, rtol=0)
    equal_trees(gradient, their_gradient, 1e-6)


def test_the_loss_of_preferences_and_its_gradient():
    prompt, answers, mask = pairs()
    trainer = dpo_trainer.DPOTrainer(
        model=model(0),
        ref_model=model(1),
        optimizer=optax.sgd(0.0),
        training_config=dpo_trainer.DPOTrainingConfig(eval_every_n_steps=1, max_steps=1, beta=BETA),
    )
    example = trainer._prepare_inputs(tunix_input(prompt, answers, mask))

    def theirs(model):
        return dpo_trainer.dpo_loss_fn(model, example, beta=BETA)[0]

    tokens = np.concatenate([np.repeat(prompt[:, None], 2, axis=1), answers], axis=-1)
    weights = np.concatenate([np.zeros((BATCH, 2, PROMPT), np.int32), mask], axis=-1)
    batch = {"tokens": jnp.asarray(tokens), "weights": jnp.asarray(weights)}

    def ours(policy):
        sums = preference(BETA)(forward, policy, model(1), batch)
        return sums["loss"] / sums["weight"]

    expected, their_gradient = nnx.value_and_grad(theirs)(model(0))
    loss, gradient = nnx.value_and_grad(ours)(model(0))
    assert abs(expected - np.log(2)) > 1e-3
    np.testing.assert_allclose(loss, expected, atol=1e-6, rtol=0)
    equal_trees(gradient, their_gradient, 1e-6)


def tunix_input(prompt, answers, mask):
    return dpo_trainer.TrainingInput(
        prompt_ids=prompt,
        prompt_mask=np.ones_like(prompt),
        chosen_ids=answers[:, 0],
        chosen_mask=mask[:, 0],
        rejected_ids=answers[:, 1],
        rejected_mask=mask[:, 1],
    )


def test_tunix_s_dpo_trainer_takes_our_optimizer():
    prompt, answers, mask = pairs()
    policy = model(0)
    trainer = dpo_trainer.DPOTrainer(
        model=policy,
        ref_model=model(0),
        optimizer=normuon(0.01, adam_learning_rate=1e-3, compute_dtype=jnp.float32),
        training_config=dpo_trainer.DPOTrainingConfig(
            eval_every_n_steps=99, max_steps=20, beta=BETA
        ),
    )
    example = trainer._prepare_inputs(tunix_input(prompt, answers, mask))
    before = dpo_trainer.dpo_loss_fn(policy, example, beta=BETA)[0]
    trainer.train([tunix_input(prompt, answers, mask)] * 20)
    after = dpo_trainer.dpo_loss_fn(policy, example, beta=BETA)[0]
    np.testing.assert_allclose(before, np.log(2), rtol=1e-6)
    assert after < 0.3


def test_tunix_s_trainer_of_fine_tuning_takes_our_optimizer():
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 32, (BATCH, 14))
    rows = peft_trainer.TrainingInput(input_tokens=tokens, input_mask=np.ones_like(tokens))
    policy = model(0)
    trainer = peft_trainer.PeftTrainer(
        policy,
        normuon(0.02, adam_learning_rate=1e-2, compute_dtype=jnp.float32),
        peft_trainer.TrainingConfig(eval_every_n_steps=99, max_steps=30),
    ).with_gen_model_input_fn(
        lambda given: {
            "input_tokens": given.input_tokens,
            "input_mask": given.input_mask,
            "positions": None,
            "attention_mask": None,
        }
    )
    before = peft_trainer._default_loss_fn(policy, tokens, rows.input_mask, None, None)
    trainer.train([rows] * 30)
    after = peft_trainer._default_loss_fn(policy, tokens, rows.input_mask, None, None)
    assert before > 3.0  # log 32 = 3.5
    assert after < 1.0  # four rows, learnt by heart
