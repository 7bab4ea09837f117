# SPDX-License-Identifier: BSD-3-Clause
"""Turns the layers of a model into their pruning twins and back, and tells what became of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias, TypeVar

from torch import nn

from .backends import describe
from .modules import DENSE_OF, PruningLayer, prune_in_place, transformers_conv1d, twin_of, unprune_in_place
from .pattern import PatternLike, Pruning

_Model = TypeVar("_Model", bound=nn.Module)

#: Pattern and method by the name of a layer.
PlanLike: TypeAlias = Mapping[str, Sequence[Any]]

# Why a layer was left dense is kept on it under this name, for report().
_REASON = "_sdgp_left_dense"

# What report() lists: modules that multiply by weights.
_LAYERS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


def convert(
    model: _Model,
    pattern: PatternLike | PlanLike = "2:4",
    method: str = "mvue",
    *,
    filter: Callable[[nn.Module, str], bool] | None = None,
    backend: str = "auto",
) -> _Model:
    """Makes every ``nn.Linear`` and ``nn.Conv2d`` of ``model`` prune its data gradient, and every ``Conv1D`` of
    transformers (GPT-2's linear layers). In place; returns ``model``.

    A layer stays the same object with the same Parameters, hooks, mode, device and dtype; only its class changes, so
    that optimizers, ``state_dict`` and wrappers (DDP, PEFT) made before go on working. Left dense, each with its reason
    in ``report``: depthwise convolutions, layers with fewer than m output channels per group, subclasses that sdgp
    does not know. Converting again replaces the settings.

    Args:
        model: any module, a single layer included.
        pattern: ``"n:m"``, ``(n, m)`` or a ``sdgp.Pattern``; or a plan, ``{layer: (pattern, method)}``, as
            ``sdgp.advise`` proposes it: layers that are not in it stay dense.
        method: see ``sdgp.prune_nm``; ``"mvue"`` is unbiased. A plan has methods of its own.
        filter: ``filter(module, name) -> bool``: False leaves that layer dense.
        backend: see ``sdgp.linear``.

    Raises:
        ValueError: ``convert: requirement, got actual``; the model is unchanged.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> model = sdgp.convert(model, "2:4", backend="pruned", filter=lambda module, name: name != "2")
    """
    check_module("convert", model)
    _check_classes("convert", model)
    settings: list[tuple[str, nn.Module, Pruning | None]]
    if isinstance(pattern, Mapping):
        planned = _planned(model, pattern, backend)
        settings = [(name, module, planned.get(name)) for name, module in layers_of(model)]
    else:
        same = Pruning.parse("convert", pattern, method, backend)
        settings = [(name, module, same) for name, module in layers_of(model)]
    plan = [(module, pruning, why_dense(module, name, pruning, filter)) for name, module, pruning in settings]
    for module, pruning, reason in plan:
        if pruning is not None and reason is None:
            prune_in_place(module, pruning)
            vars(module).pop(_REASON, None)
        else:
            if type(module) in DENSE_OF:
                unprune_in_place(module)
            setattr(module, _REASON, reason)
    return model


def revert(model: _Model) -> _Model:
    """Makes every converted layer of ``model`` a plain one again. In place; returns ``model``.

    Raises:
        ValueError: ``revert: requirement, got actual``; the model is unchanged.

    Examples:
        >>> type(sdgp.revert(sdgp.convert(torch.nn.Linear(64, 64)))).__module__
        'torch.nn.modules.linear'
    """
    check_module("revert", model)
    _check_classes("revert", model)
    for _, module in layers_of(model):
        if type(module) in DENSE_OF:
            unprune_in_place(module)
        vars(module).pop(_REASON, None)
    return model


@contextmanager
def paused(model: nn.Module) -> Iterator[None]:
    """Within it, forwards of ``model`` record exact gradients: for warm-up steps, or the last epochs.

    Examples:
        >>> model = sdgp.convert(torch.nn.Linear(64, 64), "2:4", backend="pruned")
        >>> with sdgp.paused(model):
        ...     loss = model(torch.randn(8, 64)).square().mean()
        >>> loss.backward()  # exact
    """
    check_module("paused", model)
    layers = [module for _, module in layers_of(model) if isinstance(module, PruningLayer)]
    before = [layer.paused for layer in layers]
    for layer in layers:
        layer.paused = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            if isinstance(layer, PruningLayer):  # not reverted within
                layer.paused = was


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table, its columns aligned."""
    table = [head, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return [lines[0], "-|-".join("-" * width for width in widths), *lines[1:]]


class Row(NamedTuple):
    """One layer in a ``Report``; ``pattern``, ``method`` and ``backend`` are empty where it is dense."""

    layer: str
    type: str
    pattern: str
    method: str
    backend: str
    note: str


class Report(list[Row]):
    """The rows that ``report`` found; prints as a table."""

    def __str__(self) -> str:
        return "\n".join(format_table(Row._fields, self))

    __repr__ = __str__


def report(model: nn.Module) -> Report:
    """What became of each layer of ``model``: its settings, and what they lead to or why it is dense.

    Raises:
        ValueError: where ``model`` is no ``nn.Module``.

    Examples:
        >>> model = sdgp.convert(torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Linear(4, 2)), backend="dense")
        >>> print(sdgp.report(model))
        layer | type   | pattern | method | backend | note
        ------|--------|---------|--------|---------|-----------------------------------------------------
        0     | Linear | 2:4     | mvue   | dense   | pruned, dense product
        1     | Linear |         |        |         | dense: 2 output channels per group, fewer than m = 4
    """
    check_module("report", model)
    rows = Report()
    for name, module in layers_of(model):
        layer, kind = name or "(model)", type(module).__name__
        if isinstance(module, PruningLayer):
            pattern, method, backend = module.pruning
            note = describe(module.pruning, module.last_key)
            if module.held_exact:
                note = f"exact: {module.held_exact}"
            rows.append(Row(layer, kind, str(pattern), method, backend, note))
        else:
            rows.append(Row(layer, kind, "", "", "", f"dense: {getattr(module, _REASON, 'not converted')}"))
    return rows


def check_module(op: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{op}: expected an nn.Module, got {type(model).__name__}")


def _check_classes(op: str, model: nn.Module) -> None:
    """A parametrization or a wrapper that replaced the class of a converted layer stands in the way."""
    for name, module in layers_of(model):
        if isinstance(module, PruningLayer) and type(module) not in DENSE_OF:
            raise ValueError(
                f"{op}: expected sdgp's own layers, got their subclass {type(module).__name__} for "
                f"{name or '(model)'}; undo what replaced its class (a parametrization, say) first"
            )


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that multiply by weights, each once, under its first name."""
    kinds: tuple[type[nn.Module], ...] = (*_LAYERS, *transformers_conv1d())
    for name, module in model.named_modules():
        if isinstance(module, kinds):
            yield name, module


def _planned(model: nn.Module, plan: PlanLike, backend: str) -> dict[str, Pruning]:
    names = {name for name, _ in layers_of(model)}
    if unknown := sorted(set(plan) - names):
        raise ValueError(
            f"convert: expected a plan for layers of this model, got {', '.join(map(repr, unknown))}; a wrapper, such "
            "as DistributedDataParallel, changes their names: convert what it wraps"
        )
    for name, setting in plan.items():
        if not isinstance(setting, (tuple, list)) or len(setting) != 2:
            raise ValueError(f"convert: expected a plan of (pattern, method), got {setting!r} for {name or '(model)'}")
    return {name: Pruning.parse("convert", pattern, method, backend) for name, (pattern, method) in plan.items()}


def why_dense(
    module: nn.Module, name: str, pruning: Pruning | None, filter: Callable[[nn.Module, str], bool] | None
) -> str | None:
    """The reason to leave a layer dense, or None; ``pruning``: None where a plan leaves it out."""
    if pruning is None:
        return "not in the plan"
    twin = twin_of(module)
    if twin is None:
        return _why_unknown(module)
    if filter is not None:
        wanted = filter(module, name)
        if not isinstance(wanted, bool):
            raise ValueError(f"convert: expected filter to return a bool, got {wanted!r} for {name or '(model)'}")
        if not wanted:
            return "filter returned False"
    if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
        return "depthwise convolution"
    return twin.too_narrow(module, pruning.pattern)


def _why_unknown(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return "its projections are applied inside one fused function, out of reach"
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "applied inside nn.MultiheadAttention's fused function, out of reach"
    if isinstance(module, (nn.Linear, nn.Conv2d, *transformers_conv1d())):
        after = "; convert before fully_shard" if kind.startswith("FSDP") else ""
        return f"{kind} is a subclass that sdgp does not know{after}"
    return f"only nn.Linear and nn.Conv2d are converted, not {kind}"
