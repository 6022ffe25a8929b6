"""`examples.gpt` in PyTorch: the same modules under the same names, and the same logits."""

from typing import Any

import jax
import torch
from torch import nn
from torch.nn import functional

import torch_ref
from examples.gpt import GPTConfig, first_parameters
from normuon_core.moving import NameTable, derive_table
from optax_normuon import parameter_shapes, parameters_to_arrays

EPS = 1e-6  # Flax's, of the norms


def rotate(x: torch.Tensor, base: float = 10_000.0) -> torch.Tensor:
    """Rotary positions of (batch, time, heads, size), see `examples.gpt.rotate`."""
    time, size = x.shape[1], x.shape[-1]
    frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float32, device=x.device) / size)
    angle = torch.outer(torch.arange(time, dtype=torch.float32, device=x.device), frequency)
    cos, sin = angle.cos()[None, :, None, :], angle.sin()[None, :, None, :]
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


class Attention(nn.Module):
    """Causal self-attention, (batch, time, width) to the same."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.head_size = config.head_size
        keys = config.key_heads * config.head_size
        self.query = nn.Linear(config.width, config.width, bias=False)
        self.key = nn.Linear(config.width, keys, bias=False)
        self.value = nn.Linear(config.width, keys, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.query_norm = nn.RMSNorm(self.head_size, eps=EPS)
            self.key_norm = nn.RMSNorm(self.head_size, eps=EPS)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        by_head = (*x.shape[:2], -1, self.head_size)
        query, key = self.query(x).reshape(by_head), self.key(x).reshape(by_head)
        if self.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        query, key = rotate(query), rotate(key)
        value = self.value(x).reshape(by_head)
        # PyTorch has heads before time.
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
            enable_gqa=True,
        )
        return self.out(mixed.transpose(1, 2).reshape(x.shape))


class MLP(nn.Module):
    """relu(x U)^2 V with four times the width inside."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu().square())


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=EPS)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Token ids (batch, time) to logits (batch, time, vocabulary) float32 of each next token."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.embed_norm = nn.RMSNorm(config.width, eps=EPS)
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        self.head_norm = nn.RMSNorm(config.width, eps=EPS)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed_norm(self.embed(tokens))
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.head_norm(x))


def name_table(config: GPTConfig) -> NameTable:
    """The table between the names and axes here and those of `examples.gpt`, for weights and runs."""
    with torch.device("meta"):
        named = dict(GPT(config).named_parameters())
    params = jax.eval_shape(lambda: first_parameters(config, 0))
    return derive_table(
        {name: param.shape for name, param in named.items()}, parameter_shapes(params)
    )


def load_weights(model: GPT, config: GPTConfig, params: Any) -> None:
    """Puts the weights of `examples.gpt.first_parameters` into the model."""
    arrays = name_table(config).to_torch(parameters_to_arrays(params))
    torch_ref.parameters_from_arrays(arrays, model.named_parameters())
