# SPDX-License-Identifier: BSD-3-Clause
"""Casts the arguments of a layer as autocast would, with a cache of cast weights.

An operator casts its arguments inside, but an autograd Function sees them before the cast. So linear and conv2d cast
first, and autograd casts the gradients back.

Note [Cast cache]
ATen keeps the cast of each leaf weight until the outermost autocast region ends, so that a weight that is used twice is
cast and saved once. Python cannot read ATen's cache, so `_casts` is a second cache with the same lifetime. To end with
ATen's cache, it lets ATen cast and cache a leaf of one element. Only this cached cast keeps the leaf's gradient
accumulator alive, and a hook on the accumulator holds `_casts`. So `_casts` is freed when ATen empties its cache.
"""

from __future__ import annotations

import weakref
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

OptionalTensor: TypeAlias = Tensor | None


class _Casts(dict[int, tuple[Tensor, Tensor]]):
    """The weights of one autocast region and their casts, by the weight's id. Keeping the weight keeps its id valid."""


_casts: weakref.ref[_Casts] | None = None


def autocast(input: Tensor, weight: Tensor, bias: OptionalTensor) -> tuple[Tensor, Tensor, OptionalTensor]:
    """Returns input, weight and bias as the plain operator would compute with them."""
    if not torch._C._is_any_autocast_enabled():
        return input, weight, bias
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # meta has no autocast, and the query raises
        return input, weight, bias
    dtype = torch.get_autocast_dtype(device)
    casts = (
        _casts_of_region(device) if torch.is_autocast_cache_enabled() and not torch.compiler.is_compiling() else None
    )
    return _cast(input, dtype, casts), _cast(weight, dtype, casts), None if bias is None else _cast(bias, dtype, casts)


def computed_dtype(input: Tensor) -> torch.dtype:
    """Returns the dtype in which an operator computes for this input."""
    if not torch._C._is_any_autocast_enabled() or input.dtype == torch.float64:
        return input.dtype
    device = input.device.type
    is_cast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else input.dtype


def _cast(tensor: Tensor, dtype: torch.dtype, casts: _Casts | None) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
        return tensor
    if casts is None or not (tensor.dtype == torch.float32 and tensor.is_leaf and tensor.requires_grad):
        return tensor.to(dtype)
    known = casts.get(id(tensor))
    if known is None or known[1].dtype != dtype:
        known = casts[id(tensor)] = tensor, tensor.to(dtype)
    return known[1]


def _casts_of_region(device: str) -> _Casts:
    global _casts
    casts = None if _casts is None else _casts()
    if casts is None:
        casts = _Casts()
        with _without_modes():
            leaf = torch.zeros(1, 1, dtype=torch.float32, device=device, requires_grad=True)
            accumulator: Any = leaf.view_as(leaf).grad_fn
            accumulator.next_functions[0][0].register_prehook(lambda *_, kept=casts: None)
            # addmm, because autocast casts its arguments and it saves nothing for the backward here.
            torch.addmm(leaf, leaf.detach().new_empty(1, 0), leaf.detach().new_empty(0, 1))
        _casts = weakref.ref(casts)
    return casts


def _without_modes() -> AbstractContextManager[object]:
    """Hides the token from dispatch modes: a selective checkpoint would miss its operators in the recomputation.

    Under fake tensors the token stays fake, because its device may not exist.
    """
    if any(isinstance(mode, FakeTensorMode) for mode in _get_current_dispatch_mode_stack()):
        return nullcontext()
    modes: AbstractContextManager[object] = _disable_current_modes()
    return modes
