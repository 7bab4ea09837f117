# SPDX-License-Identifier: BSD-3-Clause
"""The types that describe which product computes a data or a weight gradient.

Three products compete. ``exact`` multiplies the gradient as it is. ``dense`` prunes it and multiplies the result with
PyTorch's dense product. ``sparse`` prunes it and skips the zeros. ``plain`` is the original layer's own backward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ._pattern import Pruning
from ._semi_structured import DEFAULT, Algorithm, Operand


class Site(NamedTuple):
    """All that a choice of a product depends on. Gradients of similar size share a site.

    Attributes:
        pruning: the settings of this product.
        dtype: the dtype that the products compute in.
        values: the number of values of the input, as the exponent of the next power of two.
        pixels: the number of pixels of one sample, in the same form; 0 for a linear layer.
        groups: the number of groups of a convolution.
        geometry: stride, padding and dilation of a convolution, in one flat tuple.
        gradient: ``"data"`` or ``"weight"``.
        transposed: whether the weight is (in, out), as in the Conv1D of transformers.
        casts: how a float8 layer casts the factors of its data and of its weight gradient; empty for other layers.
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
    transposed: bool = False
    casts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """The product that computes a data or a weight gradient, the reason, and the measured times.

    Attributes:
        product: ``"plain"`` (the original layer's own backward), ``"exact"``, ``"dense"`` or ``"sparse"``.
        why: the reason, as a phrase for people.
        exact_ms, dense_ms, sparse_ms: the milliseconds of each product, with pruning and packing. None if that product
            was not measured.
        alg_id, split_k, split_k_mode: the algorithm of cuSPARSELt that computes the sparse product on a GPU.

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
    alg_id: int = DEFAULT.alg_id
    split_k: int = DEFAULT.split_k
    split_k_mode: int = DEFAULT.split_k_mode

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm of cuSPARSELt: ``alg_id``, ``split_k`` and ``split_k_mode``."""
        return Algorithm(self.alg_id, self.split_k, self.split_k_mode)

    @property
    def prunes(self) -> bool:
        """Whether the product prunes: it is ``"dense"`` or ``"sparse"``."""
        return self.product in ("dense", "sparse")

    @property
    def ms(self) -> float | None:
        """The milliseconds of the chosen product, or None."""
        ms: float | None = getattr(self, f"{self.product}_ms", None)
        return ms


class Products(Protocol):
    """One data or weight gradient, computed in three ways. Random methods draw a seed if ``seed`` is None."""

    @property
    def grad_output(self) -> Tensor: ...

    @property
    def work(self) -> int:
        """The multiply-adds of the exact product. A convolution counts as if its stride were 1."""

    def obstacle(self) -> str | None:
        """Returns why there is no sparse product, as "requirement, got actual", or None if there is one."""

    def exact(self) -> Tensor: ...

    def dense(self, seed: Tensor | None = None) -> Tensor: ...

    def sparse(self, seed: Tensor | None = None, algorithm: Algorithm = DEFAULT) -> Tensor: ...

    def operands(self, seed: Tensor | None = None) -> tuple[Operand, Tensor] | None:
        """Prunes, and returns both factors of the sparse product on a GPU, or None if GPUs have none."""
