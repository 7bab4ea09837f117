# SPDX-License-Identifier: BSD-3-Clause
"""nn.Linear and nn.Conv2d with a pruned data gradient: same Parameters, same state_dict."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import conv2d_geometry, conv2d_products, linear_products, pruned_conv2d, pruned_linear
from .backends import Key, Products, stays_exact
from .pattern import PatternLike, Pruning

if TYPE_CHECKING:
    from typing_extensions import Self

_Module = TypeVar("_Module", bound=nn.Module)


class _Pruning(nn.Module):
    """What the two layers share: the settings, and the way to and from the dense layer."""

    pruning: Pruning
    paused: bool
    last_key: Key | None  # of the choice that the last forward with a data gradient led to
    _dense: ClassVar[type[nn.Module]]

    @classmethod
    def from_dense(
        cls, dense: nn.Module, pattern: PatternLike = "2:4", method: str = "mvue", backend: str = "auto"
    ) -> Self:
        """A pruning twin of the dense layer that shares its Parameters, buffers and hooks."""
        if type(dense) is not cls._dense:
            raise ValueError(f"from_dense: expected an nn.{cls._dense.__name__}, got {type(dense).__name__}")
        layer = _share(dense, cls)
        layer.pruning = Pruning.parse(cls.__name__, pattern, method, backend)
        layer.paused, layer.last_key = False, None
        return layer

    def to_dense(self) -> nn.Module:
        """The plain layer with the same Parameters, buffers and hooks."""
        dense = _share(self, self._dense)
        del dense.pruning, dense.paused, dense.last_key
        return dense

    def __prepare_scriptable__(self) -> nn.Module:
        # Called by torch.jit.script, which would put what is returned into the model for good.
        raise RuntimeError(
            f"torch.jit.script: expected a dense model, got a {type(self).__name__} of sdgp: script "
            "sdgp.revert(copy.deepcopy(model)), whose forward is the same, or trace this one"
        )

    def _note(self, key: Key | None) -> None:
        # No key: no gradient was asked for, as in an evaluation, which changes no choice.
        if key is not None and key != self.last_key and not torch.compiler.is_compiling():
            self.last_key = key

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
        self.pruning, self.paused, self.last_key = pruning, False, None

    def forward(self, input: Tensor) -> Tensor:
        if self.paused or stays_exact(self.pruning, input.numel() * self.out_features):
            return F.linear(input, self.weight, self.bias)
        output, key = pruned_linear(input, self.weight, self.bias, self.pruning)
        self._note(key)
        return output

    def products(self, grad_output: Tensor, input: Tensor) -> Products:
        """The data gradient of a call, as :mod:`sdgp.profile` measures it."""
        return linear_products(grad_output, self.weight.detach().to(grad_output.dtype), self.pruning, ())


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
        self.pruning, self.paused, self.last_key = pruning, False, None

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.paused or stays_exact(self.pruning, input.numel() * self._work_per_value):
            output: Tensor = super()._conv_forward(input, weight, bias)
            return output
        stride: Any = self.stride
        dilation: Any = self.dilation
        input, padding = self._pad(input)
        output, key = pruned_conv2d(input, weight, bias, stride, padding, dilation, self.groups, self.pruning)
        self._note(key)
        return output

    def products(self, grad_output: Tensor, input: Tensor) -> Products:
        """The data gradient of a call, as :mod:`sdgp.profile` measures it."""
        stride: Any = self.stride
        dilation: Any = self.dilation
        input, padding = self._pad(input)
        weight = self.weight.detach()
        input, geometry = conv2d_geometry(input, weight, stride, padding, dilation, self.groups)
        if input.ndim == 3:
            input, grad_output = input.unsqueeze(0), grad_output.unsqueeze(0)
        return conv2d_products(grad_output, input, weight.to(input.dtype), geometry, self.pruning, ())

    def _pad(self, input: Tensor) -> tuple[Tensor, Any]:
        """What is not padded with zeros is padded beforehand."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0

    @property
    def _work_per_value(self) -> int:
        return self.out_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]


TWINS: dict[type[nn.Module], type[Linear | Conv2d]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}
DENSE_OF: dict[type[nn.Module], type[nn.Module]] = {twin: dense for dense, twin in TWINS.items()}


def prune_in_place(module: nn.Module, pruning: Pruning) -> None:
    """Makes a dense layer its pruning twin: the same object, so that every reference, hook and wrapper keeps it."""
    module.__class__ = TWINS.get(type(module), type(module))
    module.pruning, module.paused = pruning, vars(module).get("paused", False)  # type: ignore[assignment]
    module.last_key = None  # type: ignore[assignment]


def unprune_in_place(module: nn.Module) -> None:
    """The inverse of :func:`prune_in_place`."""
    module.__class__ = DENSE_OF[type(module)]
    del module.pruning, module.paused, module.last_key


def _share(module: nn.Module, cls: type[_Module]) -> _Module:
    """A module of class ``cls`` with the attributes of ``module``, its dictionaries copied, their contents shared."""
    twin = cls.__new__(cls)
    twin.__dict__ = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
    return twin
