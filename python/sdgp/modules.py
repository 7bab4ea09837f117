# SPDX-License-Identifier: BSD-3-Clause
"""nn.Linear and nn.Conv2d with a pruned data gradient: same Parameters, same state_dict."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import conv2d, linear
from .backends import prunes
from .pattern import PatternLike, Pruning

if TYPE_CHECKING:
    from typing_extensions import Self

_Module = TypeVar("_Module", bound=nn.Module)


class _Pruning(nn.Module):
    """What the two layers share: the settings, and the way to and from the dense layer."""

    pruning: Pruning
    paused: bool
    _dense: ClassVar[type[nn.Module]]

    @classmethod
    def from_dense(
        cls, dense: nn.Module, pattern: PatternLike = "2:4", method: str = "mvue", backend: str = "auto"
    ) -> Self:
        """A pruning twin of the dense layer that shares its Parameters, buffers and hooks."""
        if type(dense) is not cls._dense:
            raise ValueError(f"from_dense: expected an nn.{cls._dense.__name__}, got {type(dense).__name__}")
        layer = _share(dense, cls)
        layer.pruning, layer.paused = Pruning.parse(cls.__name__, pattern, method, backend), False
        return layer

    def to_dense(self) -> nn.Module:
        """The plain layer with the same Parameters, buffers and hooks."""
        dense = _share(self, self._dense)
        del dense.pruning, dense.paused
        return dense

    def extra_repr(self) -> str:
        pattern, method, backend = self.pruning
        return f"{super().extra_repr()}, pattern={pattern}, method={method}, backend={backend}"


class Linear(_Pruning, nn.Linear):
    """``nn.Linear`` through :func:`sdgp.linear`.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        pattern, method, backend: see :func:`sdgp.linear`.

    Example:
        >>> layer = sdgp.Linear(16, 32, pattern="2:4", backend="pruned")
        >>> layer(torch.randn(8, 16)).shape
        torch.Size([8, 32])
    """

    _dense = nn.Linear

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
    ) -> None:
        pruning = Pruning.parse("Linear", pattern, method, backend)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.pruning, self.paused = pruning, False

    def forward(self, input: Tensor) -> Tensor:
        if self.paused or not prunes(self.pruning):
            return F.linear(input, self.weight, self.bias)
        pattern, method, backend = self.pruning
        return linear(input, self.weight, self.bias, pattern=pattern, method=method, backend=backend)


class Conv2d(_Pruning, nn.Conv2d):
    """``nn.Conv2d`` through :func:`sdgp.conv2d`.

    Args:
        in_channels, …, dtype: as in ``nn.Conv2d``, every padding mode included.
        pattern, method, backend: see :func:`sdgp.linear`.

    Example:
        >>> layer = sdgp.Conv2d(3, 16, 3, padding=1, pattern="2:4", backend="pruned")
        >>> layer(torch.randn(2, 3, 8, 8)).shape
        torch.Size([2, 16, 8, 8])
    """

    _dense = nn.Conv2d

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
    ) -> None:
        pruning = Pruning.parse("Conv2d", pattern, method, backend)
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
        self.pruning, self.paused = pruning, False

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.paused or not prunes(self.pruning):
            output: Tensor = super()._conv_forward(input, weight, bias)
            return output
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        stride: Any = self.stride
        dilation: Any = self.dilation
        pattern, method, backend = self.pruning
        return conv2d(
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            self.groups,
            pattern=pattern,
            method=method,
            backend=backend,
        )


TWINS: dict[type[nn.Module], type[Linear | Conv2d]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}
DENSE_OF: dict[type[nn.Module], type[nn.Module]] = {twin: dense for dense, twin in TWINS.items()}


def prune_in_place(module: nn.Module, pruning: Pruning) -> None:
    """Makes a dense layer its pruning twin: the same object, so that every reference, hook and wrapper keeps it."""
    module.__class__ = TWINS.get(type(module), type(module))
    module.pruning, module.paused = pruning, vars(module).get("paused", False)  # type: ignore[assignment]


def unprune_in_place(module: nn.Module) -> None:
    """The inverse of :func:`prune_in_place`."""
    module.__class__ = DENSE_OF[type(module)]
    del module.pruning, module.paused


def _share(module: nn.Module, cls: type[_Module]) -> _Module:
    """A module of class ``cls`` with the attributes of ``module``, its dictionaries copied, their contents shared."""
    twin = cls.__new__(cls)
    twin.__dict__ = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
    return twin
