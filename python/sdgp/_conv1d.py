# SPDX-License-Identifier: BSD-3-Clause
"""``Conv1D`` with pruned gradients.

``Conv1D`` is the class of the transformers library that GPT-2 uses as its linear layer. Its weight is transposed. This
module is imported only when a Conv1D layer is converted or unpickled: sdgp works without transformers.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.pytorch_utils import Conv1D as _PlainConv1D

from ._autograd import LinearProducts, LinearWeightProducts, is_plain_again, pruned_linear, rows
from ._decision import Products
from ._layer import PruningLayer, call_plain, calls_plain
from ._past_settings import settings_of
from ._pattern import PatternLike, Pruning, WeightGradLike


class Conv1D(PruningLayer, _PlainConv1D):  # type: ignore[misc]
    """``transformers.pytorch_utils.Conv1D`` with pruned gradients.

    y = x W + b with weight (in, out), and dx = prune_nm(dy) Wᵀ. With ``weight_grad``, dW = xᵀ prune_nm(dyᵀ)ᵀ.
    """

    nf: int
    nx: int
    bias: Tensor
    _plain = _PlainConv1D

    def __init__(
        self,
        nf: int,
        nx: int,
        *,
        pattern: PatternLike = "2:4",
        method: str = "mvue",
        backend: str = "auto",
        weight_grad: WeightGradLike | None = None,
    ) -> None:
        pruning = Pruning.parse("Conv1D", pattern, method, backend, weight_grad)
        super().__init__(nf, nx)
        self._set_up(pruning)

    def forward(self, x: Tensor) -> Tensor:
        if is_plain_again(self, x):
            again: Tensor = super().forward(x)
            return again
        if calls_plain(self, x):
            plain: Tensor = call_plain(self, x)
            return plain
        self._note_input(x)
        # For a contiguous input with at most three dimensions, F.linear calls the same addmm as Conv1D.
        samples = x.reshape(-1, x.shape[-1]) if x.ndim < 3 else x.flatten(1, -2).contiguous()
        output = pruned_linear(samples, self.weight, self.bias, *settings_of(self), self, transposed=True)
        return output.view(*x.shape[:-1], self.nf)

    def products(self, grad_output: Tensor, input: Tensor, weight: Tensor | None = None) -> Products:
        weight = self.weight if weight is None else weight
        return LinearProducts(grad_output, weight.detach().t().to(grad_output.dtype), self.pruning.data)

    def weight_products(self, grad_output: Tensor, input: Tensor) -> Products:
        assert self.pruning.weight is not None
        grad, samples = rows(grad_output), rows(input.detach()).to(grad_output.dtype)
        return LinearWeightProducts(grad, samples, self.weight.detach(), True, self.pruning.weight)

    def __repr__(self) -> str:
        return f"Conv1D(nf={self.nf}, nx={self.nx}, {self.pruning})"

    @staticmethod
    def _channels(layer: Any) -> int:
        channels: int = layer.nf
        return channels
