# SPDX-License-Identifier: BSD-3-Clause
"""Models, batches and fixed times for the tests of sdgp.advise."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sdgp
from sdgp._decision import Products
from sdgp._pattern import Pruning
from sdgp._plan import Interval

SPARSE_MS = {
    "16:32": 0.8,
    "8:16": 0.8,
    "2:4": 0.8,
    "8:32": 0.6,
    "4:16": 0.6,
    "1:4": 0.6,
    "4:32": 0.3,
}  # the exact product takes 1


def as_expected(*_: Any) -> Interval:
    """Stands in for ``Steps.realized``: whole steps save what their products save."""
    return Interval(1.0, 1.0, 1.0)


class Told(sdgp.Chooser):
    """A chooser that takes the time of a sparse product from its pattern."""

    def measure(
        self, products: Products, pruning: Pruning, rounds: int | None = None, exact_ms: float | None = None
    ) -> sdgp.Decision:
        assert products.exact().shape == products.sparse().shape
        return sdgp.Decision("sparse", "", exact_ms=1.0, sparse_ms=SPARSE_MS[str(pruning.pattern)])


class Slower(sdgp.Chooser):
    def measure(
        self, products: Products, pruning: Pruning, rounds: int | None = None, exact_ms: float | None = None
    ) -> sdgp.Decision:
        return sdgp.Decision("exact", "", exact_ms=1.0, sparse_ms=2.0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def batches(count: int = 2, seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Makes batches so large that no product is too small, with noisy targets, so that the batches differ much."""
    torch.manual_seed(seed)
    return [(torch.randn(8192, 32), torch.randint(64, (8192,))) for _ in range(count)]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def gradient(model: nn.Module, batch: Any) -> Tensor:
    model.zero_grad()
    loss(model, batch).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def batch_noise(model: nn.Module, pair: list[Any]) -> float:
    one, two = (gradient(model, batch) for batch in pair)
    return float((one - two).square().sum()) / 2


class Wrapped(nn.Module):
    """A model with in-place activations, a checkpoint, a shared layer and a convolution that pads its input itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.circular = nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular")
        self.shared = nn.Conv2d(32, 32, 3, padding=1)
        self.head = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x), inplace=True)
        x = torch.utils.checkpoint.checkpoint(lambda x: F.relu(self.circular(x)), x, use_reentrant=False)
        x = F.relu(self.shared(F.relu(self.shared(x), inplace=True)), inplace=True)
        return self.head(x.flatten(2).transpose(1, 2)).mean(1)
