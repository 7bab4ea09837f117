# SPDX-License-Identifier: BSD-3-Clause
"""nn.Linear and nn.Conv2d with pruned gradients. Parameters and state_dict stay the same."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._autograd import (
    Conv2dProducts,
    Conv2dWeightProducts,
    Geometry,
    LinearProducts,
    LinearWeightProducts,
    conv2d_geometry,
    is_plain_again,
    prune_conv2d_grad,
    pruned_conv2d,
    pruned_linear,
    rows,
)
from ._decision import Decision, Products
from ._layer import PruningLayer, call_plain, calls_plain, is_traced
from ._past_settings import settings_of
from ._pattern import Pattern, PatternLike, Pruning, WeightGrad, WeightGradLike


class Linear(PruningLayer, nn.Linear):
    """Applies ``sdgp.linear``: an ``nn.Linear`` whose data gradient is computed from a pruned output gradient.

    The input is (..., in), the output (..., out). Parameters and ``state_dict`` are those of ``nn.Linear``.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        pattern, method, backend, weight_grad: as in ``sdgp.linear``.

    Raises:
        ValueError: If a setting is not valid: ``Linear: requirement, got actual``.

    Examples:
        >>> layer = sdgp.Linear(16, 32, pattern="2:4", backend="pruned")
        >>> layer(torch.randn(8, 16)).shape
        torch.Size([8, 32])
    """

    _plain = nn.Linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        pattern: PatternLike = "2:4",
        method: str = "mvue",
        backend: str = "auto",
        weight_grad: WeightGradLike | None = None,
    ) -> None:
        pruning = Pruning.parse("Linear", pattern, method, backend, weight_grad)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_up(pruning)

    def forward(self, input: Tensor) -> Tensor:
        if is_plain_again(self, input):
            return F.linear(input, self.weight, self.bias)
        if calls_plain(self, input):
            output: Tensor = call_plain(self, input)
            return output
        self._note_input(input)
        return pruned_linear(input, self.weight, self.bias, *settings_of(self), self)

    def products(self, grad_output: Tensor, input: Tensor, weight: Tensor | None = None) -> Products:
        weight = self.weight if weight is None else weight
        return LinearProducts(grad_output, weight.detach().to(grad_output.dtype), self.pruning.data)

    def weight_products(self, grad_output: Tensor, input: Tensor) -> Products:
        assert self.pruning.weight is not None
        grad, samples = rows(grad_output), rows(input.detach()).to(grad_output.dtype)
        return LinearWeightProducts(grad, samples, self.weight.detach(), False, self.pruning.weight)


class Conv2d(PruningLayer, nn.Conv2d):
    """Applies ``sdgp.conv2d``: an ``nn.Conv2d`` whose data gradient is computed from a pruned output gradient.

    The input is (N, C, H, W), the output (N, out, H', W'). Parameters and ``state_dict`` are those of ``nn.Conv2d``.

    Args:
        in_channels, …, dtype: as in ``nn.Conv2d``, with every padding mode.
        pattern, method, backend, weight_grad: as in ``sdgp.conv2d``.

    Raises:
        ValueError: If a setting is not valid: ``Conv2d: requirement, got actual``.

    Examples:
        >>> layer = sdgp.Conv2d(3, 16, 3, padding=1, pattern="2:4", backend="pruned")
        >>> layer(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    _plain = nn.Conv2d

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        pattern: PatternLike = "2:4",
        method: str = "mvue",
        backend: str = "auto",
        weight_grad: WeightGradLike | None = None,
    ) -> None:
        pruning = Pruning.parse("Conv2d", pattern, method, backend, weight_grad)
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
        )
        self._set_up(pruning)

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = call_plain(self, input) if calls_plain(self, input) else super().forward(input)
        return output

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_traced(input) or is_plain_again(self, input):
            traced: Tensor = super()._conv_forward(input, weight, bias)
            return traced
        self._note_input(input)
        stride: Any = self.stride
        dilation: Any = self.dilation
        input, padding = self._pad(input)
        return pruned_conv2d(input, weight, bias, stride, padding, dilation, self.groups, *settings_of(self), self)

    @staticmethod
    def _channels(layer: Any) -> int:
        channels: int = layer.out_channels // layer.groups
        return channels

    def products(self, grad_output: Tensor, input: Tensor, weight: Tensor | None = None) -> Products:
        return Conv2dProducts(*self._operands(grad_output, input, weight), self.pruning.data)

    def weight_products(self, grad_output: Tensor, input: Tensor) -> Products:
        assert self.pruning.weight is not None
        return Conv2dWeightProducts(*self._operands(grad_output, input.detach()), self.pruning.weight)

    def _operands(
        self, grad_output: Tensor, input: Tensor, weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Geometry]:
        stride: Any = self.stride
        dilation: Any = self.dilation
        input, padding = self._pad(input.to(grad_output.dtype))
        weight = (self.weight if weight is None else weight).detach()
        input, geometry = conv2d_geometry(input, weight, stride, padding, dilation, self.groups)
        if input.ndim == 3:
            input, grad_output = input.unsqueeze(0), grad_output.unsqueeze(0)
        return grad_output, input, weight.to(input.dtype), geometry

    def _pad(self, input: Tensor) -> tuple[Tensor, Any]:
        """Pads the input in advance if the padding mode is not ``"zeros"``."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0

    def prune(self, grad_output: Tensor, pruning: Pruning, seed: Tensor | None) -> Tensor:
        batched = grad_output if grad_output.ndim == 4 else grad_output.unsqueeze(0)
        return prune_conv2d_grad(batched, self.groups, pruning, seed).view_as(grad_output)


# Pickles and messages name the public class. torch.load(weights_only=True) may load it with its settings.
Linear.__module__ = Conv2d.__module__ = "sdgp"
torch.serialization.add_safe_globals([Linear, Conv2d, Pattern, Pruning, WeightGrad, Decision])
