# SPDX-License-Identifier: BSD-3-Clause
"""The models that train_step.py and gpu.py train, in plain PyTorch without pruning."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
import torchvision  # type: ignore[import-untyped]
from torch import Tensor, nn


def resnet18() -> nn.Module:
    """Returns a ResNet-18 for 32 x 32 images: its stem is 3 x 3 with stride 1, and no pooling follows."""
    model: nn.Module = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def resnet50() -> nn.Module:
    model: nn.Module = torchvision.models.resnet50()
    return model


def attention(block: Block | LlamaBlock, x: Tensor) -> Tensor:
    """Applies causal attention with a block's four projections. Input and output are (batch, length, width)."""
    query, key, value = (
        projection(x).unflatten(-1, (block.heads, -1)).transpose(1, 2)  # (batch, heads, length, width / heads)
        for projection in (block.query, block.key, block.value)
    )
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    result: Tensor = block.out(attended.transpose(1, 2).flatten(-2))
    return result


class Block(nn.Module):
    """A pre-LayerNorm residual block: attention and a feed-forward. Each projection is an nn.Linear."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        x = x + attention(self, self.norm_attention(x))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm_mlp(x))))
        return result


class Transformer(nn.Module):
    """A small language model over bytes."""

    def __init__(self, width: int = 512, heads: int = 8, hidden: int = 2048, depth: int = 4, length: int = 128) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(256, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, 256)
        result: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens) + self.position)))
        return result


class LlamaBlock(nn.Module):
    """A block like Llama's without rotary positions: RMSNorm, attention, a gated feed-forward, no biases."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        x = x + attention(self, self.norm_attention(x))
        y = self.norm_mlp(x)
        result: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return result


class Llama(nn.Module):
    """A language model over bytes, with a few blocks of the size of Llama-7B's."""

    def __init__(self, width: int = 4096, heads: int = 32, hidden: int = 11008, depth: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(LlamaBlock(width, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length) -> (batch, length, 256)
        result: Tensor = self.head(self.norm(self.blocks(self.embedding(tokens))))
        return result


_Model = TypeVar("_Model", Transformer, Llama)


class Adapter(nn.Module):
    """A frozen linear layer plus a trained product of two narrow ones (Hu et al., LoRA, 2022)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.narrow = nn.Linear(base.in_features, rank, bias=False)
        self.widen = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.widen(self.narrow(x))
        return result


def with_adapters(model: _Model, rank: int) -> _Model:
    """Freezes the model and puts an adapter on every linear layer of its blocks."""
    model.requires_grad_(False)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, Adapter(layer, rank))
    return model
