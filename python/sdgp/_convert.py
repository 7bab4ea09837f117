# SPDX-License-Identifier: BSD-3-Clause
"""Turns the layers of a model into pruning layers and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from ._layer import PruningLayer, pause, prune_in_place, resume, unprune_in_place
from ._load import C
from ._models import NOT_PLANNED, REASON, check_module, layers_of
from ._ops import PRUNED_DTYPES
from ._pattern import PatternLike, Pruning, WeightGradLike
from ._schedule import keep_scheduled
from ._twins import layers_of_libraries, twin_of

_Model = TypeVar("_Model", bound=nn.Module)

#: Maps the name of a layer to its pattern, its method and optionally its weight_grad.
PlanLike: TypeAlias = Mapping[str, Sequence[Any]]


class _Reason(NamedTuple):
    kind: type[nn.Module]  # the class of the layer at that time
    why: str


torch.serialization.add_safe_globals([_Reason])  # torch.load(weights_only=True) may load it


def convert(
    model: _Model,
    pattern: PatternLike | PlanLike = "2:4",
    method: str = "mvue",
    *,
    filter: Callable[[nn.Module, str], bool] | None = None,
    backend: str = "auto",
    weight_grad: WeightGradLike | None = None,
) -> _Model:
    """Makes the layers of ``model`` prune their data gradient, in place.

    The layers are ``nn.Linear``, ``nn.Conv2d``, ``Conv1D`` of transformers and ``Float8Linear`` of torchao. Weight
    gradients stay exact unless ``weight_grad`` is given.

    A layer stays the same object with the same Parameters, hooks, mode, device and dtype. Only its class changes, so
    optimizers, ``state_dict`` and wrappers (DDP, PEFT) that were made before still work. Converting a model again
    replaces the settings. These layers stay plain, and ``report`` gives the reason: depthwise convolutions, layers with
    fewer output channels per group than the m of ``pattern`` (for any ``weight_grad``), subclasses that sdgp does not
    know, layers whose forward was replaced on the instance, and layers whose weight is complex, integer or a tensor
    subclass.

    Args:
        model: any module; it may be a single layer.
        pattern: ``"n:m"``, ``(n, m)`` or a ``sdgp.Pattern``. Or a plan ``{layer: (pattern, method)}``, such as
            ``sdgp.advise`` proposes; layers that are not in the plan stay plain. An entry ``(pattern, method,
            weight_grad)`` overrides the argument ``weight_grad`` for its layer.
        method: a method of ``sdgp.prune_nm``; ``"mvue"`` and ``"unstructured"`` are unbiased. A plan contains
            its own methods.
        filter: ``filter(module, name) -> bool``; False leaves that layer plain.
        backend: as in ``sdgp.linear``.
        weight_grad: how to prune the gradient that enters the weight gradients, along rows or output pixels: a
            pattern or (pattern, method), as in ``sdgp.linear`` and ``sdgp.conv2d``. None: weight gradients are exact.

    Returns:
        ``model``.

    Raises:
        ValueError: If an argument is not valid: ``convert: requirement, got actual``. The model is then unchanged.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> model = sdgp.convert(model, "2:4", backend="pruned", filter=lambda module, name: name != "2")
        >>> model = sdgp.convert(model, "8:16", weight_grad="4:16")
    """
    check_module("convert", model)
    _check_classes("convert", model)
    settings: list[tuple[str, nn.Module, Pruning | None]]
    if isinstance(pattern, Mapping):
        planned = _planned(model, pattern, backend, weight_grad)
        settings = [(name, module, planned.get(name)) for name, module in layers_of(model)]
    else:
        same = Pruning.parse("convert", pattern, method, backend, weight_grad)
        settings = [(name, module, same) for name, module in layers_of(model)]
    plan = [
        (module, pruning, why_plain("convert", module, name, pruning, filter)) for name, module, pruning in settings
    ]
    for module, pruning, why in plan:
        twin = twin_of(module)
        if why is None and twin is not None and pruning is not None:
            _drop_own_forward(module)
            prune_in_place(module, twin, pruning)
            keep_scheduled(module)
            vars(module).pop(REASON, None)
        else:
            if isinstance(module, PruningLayer):
                unprune_in_place(module)
            vars(module)[REASON] = _Reason(type(module), why or "")
    return model


def revert(model: _Model) -> _Model:
    """Turns every converted layer of ``model`` back into a plain layer, in place: the inverse of ``convert``.

    Args:
        model: any module; it may be a single layer, and it need not be converted.

    Returns:
        ``model``.

    Raises:
        ValueError: If ``model`` is not valid: ``revert: requirement, got actual``. The model is then unchanged.

    Examples:
        >>> type(sdgp.revert(sdgp.convert(torch.nn.Linear(64, 64)))).__module__
        'torch.nn.modules.linear'
    """
    check_module("revert", model)
    _check_classes("revert", model)
    for _, module in layers_of(model):
        if isinstance(module, PruningLayer):
            unprune_in_place(module)
        vars(module).pop(REASON, None)
    return model


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Makes forwards of ``model`` inside the block record exact gradients, for warm-up steps or the last epochs.

    This includes layers that are converted inside the block, but not copies of layers. Pauses may overlap in any order.
    The forward decides: its backward is exact also after the block.

    Args:
        model: any module; it may be a single layer.

    Raises:
        ValueError: If ``model`` is not an ``nn.Module``.

    Examples:
        >>> model = sdgp.convert(torch.nn.Linear(64, 64), "2:4", backend="pruned")
        >>> with sdgp.paused(model):
        ...     loss = model(torch.randn(8, 64)).square().mean()
        >>> loss.backward()  # exact
    """
    check_module("paused", model)
    layers = [layer for _, layer in layers_of(model)]
    for layer in layers:
        pause(layer)
    try:
        yield
    finally:
        for layer in layers:
            resume(layer)


def _check_classes(op: str, model: nn.Module) -> None:
    """Raises an error if a parametrization or a wrapper replaced the class of a converted layer."""
    for name, module in layers_of(model):
        if isinstance(module, PruningLayer) and twin_of(module) is None:
            raise ValueError(
                f"{op}: expected sdgp's own layers, got their subclass {type(module).__name__} for "
                f"{name or '(model)'}; undo what replaced its class (a parametrization, say) first"
            )


def _planned(model: nn.Module, plan: PlanLike, backend: str, weight_grad: WeightGradLike | None) -> dict[str, Pruning]:
    names = {name for name, _ in layers_of(model)}
    if unknown := sorted(set(plan) - names):
        raise ValueError(
            f"convert: expected a plan for layers of this model, got {', '.join(map(repr, unknown))}; a wrapper, such "
            "as DistributedDataParallel, changes their names: convert what it wraps"
        )
    for name, setting in plan.items():
        if not isinstance(setting, (tuple, list)) or len(setting) not in (2, 3):
            raise ValueError(
                "convert: expected a plan of (pattern, method) or (pattern, method, weight_grad), "
                f"got {setting!r} for {name or '(model)'}"
            )
    return {
        name: Pruning.parse("convert", pattern, method, backend, *(own or (weight_grad,)))
        for name, (pattern, method, *own) in plan.items()
    }


def why_plain(
    op: str, module: nn.Module, name: str, pruning: Pruning | None, filter: Callable[[nn.Module, str], bool] | None
) -> str | None:
    """Returns the reason to leave a layer plain, or None. ``pruning`` is None if a plan does not contain the layer."""
    if pruning is None:
        return NOT_PLANNED
    twin = twin_of(module)
    if twin is None:
        return _why_unknown(module)
    if filter is not None:
        wanted = filter(module, name)
        if not isinstance(wanted, bool):
            raise ValueError(f"{op}: expected filter to return a bool, got {wanted!r} for {name or '(model)'}")
        if not wanted:
            return "filter returned False"
    if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
        return "depthwise convolution"
    return _why_replaced(module) or _why_unusual(module.weight) or twin.too_narrow(module, pruning.pattern)


def stated_reason(module: nn.Module) -> str:
    """Returns why a layer is plain, as ``convert`` stored it."""
    reason: _Reason | None = vars(module).get(REASON)
    if reason is None:
        return "not converted"
    if reason.kind is not type(module):
        return f"was a {reason.kind.__name__} when sdgp.convert saw it: convert again"
    return reason.why


def _why_replaced(module: nn.Module) -> str | None:
    """Returns a reason if the instance has its own forward, which conversion cannot change: it changes the class."""
    for name in ("forward", "_conv_forward"):
        if name in vars(module) and not _is_own_method(module, name) and not isinstance(module, PruningLayer):
            return f"its {name} was replaced on the instance, for example by accelerate: call sdgp.convert before that"
    return None


def _is_own_method(module: nn.Module, name: str) -> bool:
    """Returns whether the attribute is the class's own method. A library leaves it there when it removes a hook."""
    method = vars(module).get(name)
    own = getattr(type(module), name, None)
    return getattr(method, "__self__", None) is module and getattr(method, "__func__", None) is own


def _drop_own_forward(module: nn.Module) -> None:
    for name in ("forward", "_conv_forward"):
        if _is_own_method(module, name):
            vars(module).pop(name)


def _why_unusual(weight: Any) -> str | None:
    """Returns a reason if the kernels cannot read the weight. Sharded weights can be checked only at the call."""
    kind = type(weight)
    if kind not in (Tensor, nn.Parameter) and not isinstance(weight, FakeTensor) and not hasattr(weight, "placements"):
        return f"its weight is a {kind.__name__}, a subclass of Tensor"
    if weight.dtype not in PRUNED_DTYPES:
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}; pruned are {', '.join(C.dtypes)}"
    return None


def _why_unknown(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are applied inside one fused function, so sdgp cannot convert them"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "applied inside nn.MultiheadAttention's fused function, so sdgp cannot convert it"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return f"{kind} has no weight before its first forward: convert after it"
    if isinstance(module, (nn.Linear, nn.Conv2d, *layers_of_libraries())):
        after = "; convert before fully_shard" if kind.startswith("FSDP") else ""
        return f"{kind} is a subclass that sdgp does not know{after}"
    return f"nn.Linear, nn.Conv2d, transformers' Conv1D and torchao's Float8Linear are converted, not {kind}"
