# SPDX-License-Identifier: BSD-3-Clause
"""transformers' Conv1D (GPT-2's linear layer, its weight transposed) with a pruned data gradient.

Imported where such a layer is converted or unpickled, and nowhere else: sdgp does without transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D as _DenseConv1D

from .autograd import linear_products, pruned_linear
from .backends import Products
from .modules import DENSE_OF, TWINS, PruningLayer
from .pattern import PatternLike, Pruning


class Conv1D(PruningLayer, _DenseConv1D):  # type: ignore[misc]
    """``transformers.pytorch_utils.Conv1D``: y = x W + b of weight (in, out), dx = prune_nm(dy) Wᵀ."""

    nf: int
    nx: int
    bias: Tensor
    _dense = _DenseConv1D

    def __init__(
        self, nf: int, nx: int, *, pattern: PatternLike = "2:4", method: str = "mvue", backend: str = "auto"
    ) -> None:
        pruning = Pruning.parse("Conv1D", pattern, method, backend)
        super().__init__(nf, nx)
        self.pruning, self.paused, self.last_key = pruning, False, None

    def forward(self, x: Tensor) -> Tensor:
        if self._is_exact(x):
            output: Tensor = super().forward(x)
            return output
        # In at most three dimensions and without gaps a linear layer calls the addmm that Conv1D calls.
        samples = x.reshape(-1, x.shape[-1]) if x.ndim < 3 else x.flatten(1, -2).contiguous()
        output, key = pruned_linear(samples, self.weight.t(), self.bias, self.pruning)
        self._note(key)
        return output.view(*x.shape[:-1], self.nf)

    def products(self, grad_output: Tensor, input: Tensor) -> Products:
        return linear_products(grad_output, self.weight.detach().t().to(grad_output.dtype), self.pruning, ())

    def work(self, input: Tensor) -> int:
        return input.numel() * self.nf

    def __repr__(self) -> str:
        pattern, method, backend = self.pruning
        return f"Conv1D(nf={self.nf}, nx={self.nx}, pattern={pattern}, method={method}, backend={backend})"

    @staticmethod
    def _channels(layer: Any) -> int:
        channels: int = layer.weight.shape[1]
        return channels


TWINS[_DenseConv1D] = Conv1D
DENSE_OF[Conv1D] = _DenseConv1D
