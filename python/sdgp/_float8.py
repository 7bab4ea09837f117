# SPDX-License-Identifier: BSD-3-Clause
"""``Float8Linear`` with pruned gradients.

``Float8Linear`` is the layer of torchao's float8 training. This module is imported only when such a layer is converted
or unpickled: sdgp works without torchao.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchao.float8.float8_linear import Float8Linear as _PlainFloat8Linear

from ._autograd import is_plain_again, rows
from ._autograd._float8 import Float8Products, LayerCasts, pruned_float8_linear
from ._decision import Products
from ._layer import PruningLayer, call_plain, calls_plain
from ._past_settings import settings_of
from ._pattern import PatternLike, Pruning, WeightGradLike


class Float8Linear(PruningLayer, _PlainFloat8Linear):  # type: ignore[misc]
    """``torchao.float8.float8_linear.Float8Linear`` with pruned gradients.

    y = q(x) q(W)ᵀ + b and dx = q(prune_nm(dy)) q(W), where q casts to float8 with a scale. With ``weight_grad``,
    dW = q(prune_nm(dyᵀ)) q(x).

    The exact and the dense product cast as torchao does. The sparse product casts to float8_e4m3fn, with a scale for
    each row of the pruned gradient.
    """

    bias: Tensor | None
    _casts: LayerCasts
    _plain = _PlainFloat8Linear
    _rows_multiple = 16

    def __init__(
        self,
        *args: Any,
        pattern: PatternLike = "2:4",
        method: str = "mvue",
        backend: str = "auto",
        weight_grad: WeightGradLike | None = None,
        **kwargs: Any,
    ) -> None:
        pruning = Pruning.parse("Float8Linear", pattern, method, backend, weight_grad)
        super().__init__(*args, **kwargs)
        self._set_up(pruning)

    def forward(self, input: Tensor) -> Tensor:
        if is_plain_again(self, input):
            again: Tensor = super().forward(input)
            return again
        if calls_plain(self, input):
            plain: Tensor = call_plain(self, input)
            return plain
        self._note_input(input)
        output = pruned_float8_linear(input, self.weight, *settings_of(self), self, self._casts)
        if output is None:
            exact: Tensor = super().forward(input)
            return exact
        return output if self.bias is None else output + self.bias.to(output.dtype)

    def products(self, grad_output: Tensor, input: Tensor, weight: Tensor | None = None) -> Products:
        weight = self.weight if weight is None else weight
        return Float8Products(grad_output, weight.detach(), self._casts.data, "data", self.pruning.data)

    def weight_products(self, grad_output: Tensor, input: Tensor) -> Products:
        assert self.pruning.weight is not None
        grad, samples = rows(grad_output).t(), rows(input.detach()).to(grad_output.dtype)
        return Float8Products(grad, samples, self._casts.weight, "weight", self.pruning.weight)

    def _set_up(self, pruning: Pruning) -> None:
        super()._set_up(pruning)
        self._casts = LayerCasts.of(self)
