# SPDX-License-Identifier: BSD-3-Clause
"""Which product computes a data or a weight gradient, as data.

Three products compete. ``exact`` multiplies the gradient as it is; ``dense`` prunes it and multiplies the result with
PyTorch's dense product; ``sparse`` prunes it and skips the zeros. ``plain`` is the original layer's own backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._pattern import Pruning


class Site(NamedTuple):
    """What a choice depends on: the gradients of one kind on one machine. Gradients of similar size share a site.

    Attributes:
        pruning: the settings of this one product.
        dtype: that the products compute in.
        values: the number of the input's values, as the exponent of the next power of two.
        pixels: the pixels of one sample, likewise; 0 for a linear layer.
        groups: of a convolution.
        geometry: stride, padding and dilation of a convolution, flat.
        gradient: which one: ``"data"`` or ``"weight"``.
    """

    op: str
    device: torch.device
    dtype: torch.dtype
    threads: int
    pruning: Pruning
    weight_shape: tuple[int, ...]
    weight_contiguous: bool
    values: int
    pixels: int = 0
    groups: int = 1
    geometry: tuple[int | str, ...] = ()
    channels_last: bool = False
    gradient: str = "data"


@dataclass(frozen=True)
class Decision:
    """Which product a data or a weight gradient takes, why, and the milliseconds of each product that was measured.

    Attributes:
        product: ``"plain"`` (the original layer's own backward), ``"exact"``, ``"dense"`` or ``"sparse"``.
        why: a phrase for a person.
        exact_ms, dense_ms, sparse_ms: None where that product was not measured. Pruning and packing are included.

    Examples:
        >>> layer = sdgp.Linear(16, 16, backend="dense")
        >>> layer(torch.randn(8, 16, requires_grad=True)).sum().backward()
        >>> layer.decision.product, layer.decision.prunes
        ('dense', True)
    """

    product: str
    why: str
    exact_ms: float | None = None
    dense_ms: float | None = None
    sparse_ms: float | None = None

    @property
    def prunes(self) -> bool:
        return self.product in ("dense", "sparse")

    @property
    def ms(self) -> float | None:
        """The milliseconds of the product that was taken."""
        ms: float | None = getattr(self, f"{self.product}_ms", None)
        return ms


class Products(Protocol):
    """One data or weight gradient, computed in three ways. ``seed`` is that of random methods; None: it is drawn."""

    @property
    def grad_output(self) -> Tensor: ...

    @property
    def work(self) -> int:
        """Multiply-adds of the exact product, of a convolution as if its stride were 1."""

    def obstacle(self) -> str | None:
        """Why there is no sparse product, as "requirement, got actual"; None: there is one."""

    def exact(self) -> Tensor: ...

    def dense(self, seed: Tensor | None = None) -> Tensor: ...

    def sparse(self, seed: Tensor | None = None) -> Tensor: ...
