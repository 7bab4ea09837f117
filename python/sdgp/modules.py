# SPDX-License-Identifier: BSD-3-Clause
"""nn.Linear and nn.Conv2d with a pruned data gradient: same Parameters, same state_dict."""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autograd import (
    conv2d_geometry,
    conv2d_products,
    linear_products,
    prune_conv2d_grad,
    pruned_conv2d,
    pruned_linear,
)
from .backends import Key, Products, is_pruned, stays_exact
from .ops import prune_nm
from .pattern import Pattern, PatternLike, Pruning

if TYPE_CHECKING:
    from typing_extensions import Self

_Module = TypeVar("_Module", bound=nn.Module)


class PruningLayer(nn.Module):
    """What the layers share: the settings, and the way to and from the dense layer."""

    weight: Tensor
    pruning: Pruning
    paused: bool
    exact: str = ""  # why a sdgp.Schedule keeps the data gradient exact now; empty: it does not
    set_aside: str = ""  # why a sdgp.watch keeps it exact from now on; empty: it does not
    last_key: Key | None  # of the choice that the last forward with a data gradient led to
    _dense: ClassVar[type[nn.Module]]

    @classmethod
    def from_dense(
        cls, dense: nn.Module, pattern: PatternLike = "2:4", method: str = "mvue", backend: str = "auto"
    ) -> Self:
        """A pruning twin of the dense layer that shares its Parameters, buffers and hooks.

        Raises:
            ValueError: ``from_dense: requirement, got actual``; a subclass is another class.
        """
        if type(dense) is not cls._dense:
            raise ValueError(f"from_dense: expected an nn.{cls._dense.__name__}, got {type(dense).__name__}")
        layer = _share(dense, cls)
        layer.pruning = Pruning.parse(cls.__name__, pattern, method, backend)
        layer.paused, layer.last_key = False, None
        return layer

    def to_dense(self) -> nn.Module:
        """The plain layer with the same Parameters, buffers and hooks."""
        dense = _share(self, self._dense)
        _drop_settings(dense)
        return dense

    def __prepare_scriptable__(self) -> nn.Module:
        # Called by torch.jit.script, which would put what is returned into the model for good.
        raise RuntimeError(
            f"torch.jit.script: expected a dense model, got a {type(self).__name__} of sdgp: script "
            "sdgp.revert(copy.deepcopy(model)), whose forward is the same, or trace this one"
        )

    @classmethod
    def too_narrow(cls, layer: nn.Module, pattern: Pattern) -> str | None:
        """Why a layer, this or its dense twin, has no whole group of the pattern; None: it has."""
        channels = cls._channels(layer)
        return f"{channels} output channels per group, fewer than m = {pattern.m}" if channels < pattern.m else None

    @staticmethod
    def _channels(layer: Any) -> int:
        """Of the output, per group of a convolution."""
        channels: int = layer.weight.shape[0]
        return channels

    def products(self, grad_output: Tensor, input: Tensor) -> Products:
        """The data gradient of a call, as ``sdgp.profile`` measures it."""
        raise NotImplementedError

    def prune(self, grad_output: Tensor, seed: Tensor | None) -> Tensor:
        """The output gradient as it enters the data-gradient product: pruned along the output features."""
        (n, m), method, _ = self.pruning
        return prune_nm(grad_output, n, m, -1, method, seed)

    def work(self, input: Tensor) -> int:
        """Multiply-adds of the data gradient of a call (at stride 1)."""
        raise NotImplementedError

    @property
    def held_exact(self) -> str:
        """Why the next forward records an exact gradient whatever the settings; empty: it need not."""
        if self.paused:
            return "paused"
        return self.exact or self.set_aside

    @property
    def is_pruning(self) -> bool:
        """Whether gradients like that of the last forward are pruned, as far as is known."""
        return not self.held_exact and is_pruned(self.pruning, self.last_key)

    def _is_exact(self, input: Tensor) -> bool:
        """Before anything else is looked at."""
        return self.paused or bool(self.exact or self.set_aside) or stays_exact(self.pruning, self.work(input))

    def _note(self, key: Key | None) -> None:
        # No key: no gradient was asked for, as in an evaluation, which changes no choice.
        if key is not None and key != self.last_key and not torch.compiler.is_compiling():
            self.last_key = key

    def extra_repr(self) -> str:
        pattern, method, backend = self.pruning
        return f"{super().extra_repr()}, pattern={pattern}, method={method}, backend={backend}"


class Linear(PruningLayer, nn.Linear):
    """``nn.Linear`` through ``sdgp.linear``: (..., in) to (..., out), with the same Parameters and ``state_dict``.

    Args:
        in_features, out_features, bias, device, dtype: as in ``nn.Linear``.
        pattern, method, backend: see ``sdgp.linear``.

    Raises:
        ValueError: ``Linear: requirement, got actual``.

    Examples:
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
        if self._is_exact(input):
            return F.linear(input, self.weight, self.bias)
        output, key = pruned_linear(input, self.weight, self.bias, self.pruning)
        self._note(key)
        return output

    def products(self, grad_output: Tensor, input: Tensor) -> Products:
        return linear_products(grad_output, self.weight.detach().to(grad_output.dtype), self.pruning, ())

    def work(self, input: Tensor) -> int:
        return input.numel() * self.out_features


class Conv2d(PruningLayer, nn.Conv2d):
    """``nn.Conv2d`` through ``sdgp.conv2d``: (N, C, H, W) to (N, out, H', W'), with the same ``state_dict``.

    Args:
        in_channels, …, dtype: as in ``nn.Conv2d``, every padding mode included.
        pattern, method, backend: see ``sdgp.linear``.

    Raises:
        ValueError: ``Conv2d: requirement, got actual``.

    Examples:
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
        if self._is_exact(input):
            output: Tensor = super()._conv_forward(input, weight, bias)
            return output
        stride: Any = self.stride
        dilation: Any = self.dilation
        input, padding = self._pad(input)
        output, key = pruned_conv2d(input, weight, bias, stride, padding, dilation, self.groups, self.pruning)
        self._note(key)
        return output

    @staticmethod
    def _channels(layer: Any) -> int:
        channels: int = layer.weight.shape[0] // layer.groups
        return channels

    def products(self, grad_output: Tensor, input: Tensor) -> Products:
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

    def prune(self, grad_output: Tensor, seed: Tensor | None) -> Tensor:
        batched = grad_output if grad_output.ndim == 4 else grad_output.unsqueeze(0)
        return prune_conv2d_grad(batched, self.groups, self.pruning, seed).view_as(grad_output)

    def work(self, input: Tensor) -> int:
        return input.numel() * self.out_channels // self.groups * self.kernel_size[0] * self.kernel_size[1]


# The twin of transformers' Conv1D joins them when convert first meets such a layer.
TWINS: dict[type[nn.Module], type[PruningLayer]] = {nn.Linear: Linear, nn.Conv2d: Conv2d}
DENSE_OF: dict[type[nn.Module], type[nn.Module]] = {twin: dense for dense, twin in TWINS.items()}


def transformers_conv1d() -> tuple[type[nn.Module], ...]:
    """transformers' own class; nothing as long as nobody imported that: then there are no such layers."""
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return () if conv1d is None else (conv1d,)


def twin_of(module: nn.Module) -> type[PruningLayer] | None:
    """The class that a layer has, or gets, when it prunes; None: sdgp does not know it."""
    kind = type(module)
    if kind in transformers_conv1d():
        from . import conv1d as conv1d
    return kind if kind in DENSE_OF else TWINS.get(kind)  # type: ignore[return-value]


def prune_in_place(module: nn.Module, pruning: Pruning) -> None:
    """Makes a dense layer its pruning twin: the same object, so that every reference, hook and wrapper keeps it."""
    module.__class__ = TWINS.get(type(module), type(module))
    module.pruning, module.paused = pruning, vars(module).get("paused", False)  # type: ignore[assignment]
    module.last_key = None  # type: ignore[assignment]
    vars(module).pop("set_aside", None)


def unprune_in_place(module: nn.Module) -> None:
    """The inverse of ``prune_in_place``."""
    module.__class__ = DENSE_OF[type(module)]
    _drop_settings(module)


def _drop_settings(module: nn.Module) -> None:
    for name in ("pruning", "paused", "exact", "set_aside", "last_key"):
        vars(module).pop(name, None)


def _share(module: nn.Module, cls: type[_Module]) -> _Module:
    """A module of class ``cls`` with the attributes of ``module``, its dictionaries copied, their contents shared."""
    twin = cls.__new__(cls)
    twin.__dict__ = {key: copy.copy(value) if isinstance(value, dict) else value for key, value in vars(module).items()}
    return twin
