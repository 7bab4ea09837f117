# SPDX-License-Identifier: BSD-3-Clause
"""Measures whether pruning pays for a model on this machine, and proposes what to prune: a plan with a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ._convert import paused, why_plain
from ._hints import START_EXACT, hints
from ._layer import PruningLayer, prune_in_place
from ._models import check_eager, check_module, check_whole, layers_of
from ._noise import Norm, difference, samples_of, tensors_of
from ._pattern import UNBIASED_METHODS, Pattern, PatternLike, Pruning, methods_on
from ._plan import Plan
from ._step import Loss, check_optimizer, state_kept
from ._steps import Memory, Steps, UnusableBatch
from ._study import Study, sparsity
from ._twins import twin_of


def advise(
    model: nn.Module,
    *batches: Any,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    patterns: Iterable[PatternLike] | None = None,
    methods: Iterable[str] | None = None,
    filter: Callable[[nn.Module, str], bool] | None = None,
    rounds: int = 3,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Measures whether pruning pays for ``model`` on these batches and this machine, and proposes what to prune.

    Pruning saves a share S of a step's time. It also adds noise to the gradient: τ times the noise that the choice of
    the minibatch brings anyway. The model then needs 1 + τ times the steps for the same loss. The net saving is

        net = 1 - (1 - S) (1 + τ)

    ``advise`` times the sparse and the exact product of each layer's data and weight gradient. It measures the noise
    that each pruned gradient would add to the gradient of *all* parameters, and chooses the patterns with the largest
    ``net``. Then it times whole steps with the plan and without it in turn, and corrects S. If nothing pays, the plan
    is empty. ``advise`` leaves the model, its gradients and buffers and PyTorch's random number generators unchanged.
    ``sdgp.chooser`` keeps the times of the plan's products, so that training does not measure them again.

    Gradients change during training, and an untrained model tolerates pruning worst: train for a few hundred steps
    first. The model is measured in its current mode: call ``model.train()`` before. A step is a forward and a backward;
    it does not include the optimizer or the loading of data. On a CPU with AVX-512 a note says if plain bfloat16 saves
    time, because pruning has to beat the faster precision.

    Args:
        model: a plain or converted model.
        batches: batches of the training data. The first dimension of each tensor is the sample. A single batch is split
            into halves, which are compared; four batches give a better estimate. Batches with another number of samples
            than the first are ignored.
        loss: ``loss(model, batch)`` runs the forward and returns a scalar. Default: the default of ``sdgp.profile``.
        optimizer: the optimizer that trains the model. If it is Adam or similar and has made steps, the noise of each
            coordinate is scaled as the optimizer scales its steps. Parameters that it does not train are ignored.
        patterns: the patterns to try. Default on a CPU: 16:32, 8:32 and 4:32, because wide groups take no longer than
            narrow ones there and add less noise; groups half as wide where a layer is too narrow. Default on other
            devices: 2:4 and 1:4.
        methods: the methods to try. Default: the unbiased ones, ``"mvue"`` and, on a CPU, ``"unstructured"``. The
            errors of other methods do not average out, and their total is larger than the sum of the candidates'
            noise; the noise of the whole plan is measured.
        filter: ``filter(module, name) -> bool``. A layer for which it returns False stays plain.
        rounds: the number of timing rounds. The shortest time counts, because other programs only make times longer.
        progress: a function that is called with the name of each stage when the stage begins.

    Returns:
        A ``Plan`` for ``sdgp.convert(model, plan)``. ``sdgp.plot`` draws the plan and its candidates.

    Raises:
        ValueError: If an argument is invalid, or an optimizer steps in the backward. The message reads
            ``advise: requirement, got actual``.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> data = torch.utils.data.TensorDataset(torch.randn(32, 64), torch.randint(10, (32,)))
        >>> batches = torch.utils.data.DataLoader(data, batch_size=8)
        >>> def loss(model, batch):
        ...     input, target = batch
        ...     return torch.nn.functional.cross_entropy(model(input), target)
        >>> plan = sdgp.advise(model, *batches, loss=loss)
        >>> model = sdgp.convert(model, plan)
    """
    return advised(
        model, batches, loss, optimizer, patterns, methods, filter, rounds, progress or (lambda stage: None), Memory()
    )


def advised(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss | None,
    optimizer: torch.optim.Optimizer | None,
    patterns: Iterable[PatternLike] | None,
    methods: Iterable[str] | None,
    filter: Callable[[nn.Module, str], bool] | None,
    rounds: int,
    say: Callable[[str], None],
    memory: Memory,
) -> Plan:
    """Does the work of ``advise``, and reuses the times that earlier calls left in ``memory``."""
    _check(model, batches, rounds)
    norm, twins, reasons = prepared("advise", model, optimizer, patterns, methods, filter)
    check_optimizer("advise", norm.scales)
    steps = Steps(model, batches, loss, norm, rounds, memory)
    samples = samples_of(batches[0])
    if len(steps.batches) == 1 and (samples is None or samples < 2):
        got = "one whose tensors share no first dimension" if samples is None else f"one of {samples}"
        raise UnusableBatch(f"advise: expected several batches of one size, or one of at least two samples, got {got}")
    memory.fit(batches[0])
    names = {module: name for name, module in layers_of(model)}
    study = Study(steps, names, twins, narrow_for_wide=patterns is None)
    others = [tensor for batch in batches for tensor in tensors_of(batch) if tensor.is_leaf]
    others += [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
    with state_kept("advise", model, *others), paused(model):
        say("steps")
        steps.time()
        say("products")
        study.measure_products()
        say("noise of the batch")
        noise = steps.batch_noise(study.exact)
        say("noise on its way through the layers")
        study.measure_amplifications()
        candidates = study.candidates(noise)
        reasons = {name: reasons[name] if name in reasons else study.why_not(module) for module, name in names.items()}
        notes = list(hints(steps, study, optimizer, candidates))
        plan = Plan(candidates, reasons, memory.step_ms, norm.kind, noise.error, notes)
        if plan.saved >= 1:
            memory.forget()
            raise UnusableBatch(
                "advise: expected an idle machine, got layers that take longer than the step: ask again"
            )
        if plan.chosen:
            say("steps with the plan")
            if memory.realized is None:
                memory.realized = steps.realized(lambda: _pruned(model, plan, "auto"), plan.saved)
            plan.take_realized(memory.realized)
            if not plan.chosen:
                memory.realized = None  # perhaps the machine was busy: the next call measures it again
        for _ in range(3):  # a choice that changes is measured again
            if not plan.chosen:
                break
            say("noise of the plan")
            with _pruned(model, plan, "dense"):
                pruned = steps.gradients(batches[0])
            if plan.take_measured(norm.squared(difference(pruned, study.exact)) / noise.mean):
                break
    if any(isinstance(module, nn.Conv2d) and name in plan for module, name in names.items()):
        plan.notes.append(START_EXACT)
    return plan


def _check(model: nn.Module, batches: Sequence[Any], rounds: int) -> None:
    check_module("advise", model)
    check_whole("advise", model)
    check_eager("advise", model)
    if not batches:
        raise ValueError("advise: expected at least one batch, got none")
    if isinstance(batches[0], torch.utils.data.DataLoader):
        raise ValueError("advise: expected batches, got a DataLoader: pass some of its batches")
    if isinstance(batches[0], Iterator):
        raise ValueError("advise: expected batches, got an iterator: pass *batches")
    if rounds < 1:
        raise ValueError(f"advise: expected rounds >= 1, got {rounds}")


def prepared(
    op: str,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    patterns: Iterable[PatternLike] | None,
    methods: Iterable[str] | None,
    filter: Callable[[nn.Module, str], bool] | None,
) -> tuple[Norm, dict[nn.Module, list[PruningLayer]], dict[str, str]]:
    """Checks the arguments. Returns the norm of the noise, the twins of the layers, and why other layers have none."""
    if isinstance(patterns, str) or isinstance(methods, str):
        raise ValueError(f"{op}: expected lists of patterns and methods, got {patterns!r} and {methods!r}")
    norm = Norm.of(op, model, optimizer)
    methods = list(dict.fromkeys(_default_methods(model) if methods is None else methods))
    tried = [
        [Pruning.parse(op, pattern, method, "auto", (pattern, method)) for method in methods]
        for pattern in (_default_patterns(model) if patterns is None else map(Pattern.parse, patterns))
    ]
    if not any(tried):
        raise ValueError(f"{op}: expected at least one pattern and one method, got none")
    settings = sorted((pruning for row in tried for pruning in row), key=lambda pruning: -sparsity(pruning))
    twins, reasons = _twins(op, model, settings, filter)
    if not twins:
        why = f": {next(iter(reasons.values()))}" if reasons else ""
        raise ValueError(f"{op}: expected a model with layers to prune, got none{why}")
    return norm, twins, reasons


def _default_patterns(model: nn.Module) -> list[Pattern]:
    if _device_type(model) != "cpu":
        return [Pattern(2, 4), Pattern(1, 4)]
    wide = [Pattern(16, 32), Pattern(8, 32), Pattern(4, 32)]
    return [*wide, *(_half_as_wide(pattern) for pattern in wide)]


def _default_methods(model: nn.Module) -> list[str]:
    return [method for method in UNBIASED_METHODS if method in methods_on(_device_type(model))]


def _device_type(model: nn.Module) -> str:
    parameter = next(model.parameters(), None)
    return "" if parameter is None else parameter.device.type


def _half_as_wide(pattern: Pattern) -> Pattern:
    return Pattern(pattern.n // 2, pattern.m // 2)


@contextmanager
def _pruned(model: nn.Module, plan: Mapping[str, tuple[Any, ...]], backend: str) -> Iterator[None]:
    """Makes the layers of ``plan`` prune inside the context."""
    modules = dict(layers_of(model))
    before = [(modules[name], type(modules[name]), dict(vars(modules[name]))) for name in plan]
    for name, (pattern, method, *weight) in plan.items():
        module = modules[name]
        twin = twin_of(module)
        assert twin is not None  # the plan holds only layers that have a candidate
        prune_in_place(module, twin, Pruning.parse("advise", pattern, method, backend, *weight))
        module.holds = {}  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)


def _twins(
    op: str, model: nn.Module, settings: list[Pruning], filter: Callable[[nn.Module, str], bool] | None
) -> tuple[dict[nn.Module, list[PruningLayer]], dict[str, str]]:
    """Makes a converted twin of each layer for every setting. The twins share the layer's Parameters.

    Returns:
        The twins of each layer, and for each layer without twins the reason, by name.
    """
    twins, reasons = {}, {}
    for name, module in layers_of(model):
        why = why_plain(op, module, name, Pruning.parse("advise", "1:1", "mvue", "auto"), filter)
        twin = twin_of(module)
        if why is not None or twin is None:
            reasons[name] = str(why)
            continue
        plain = module.to_plain() if isinstance(module, PruningLayer) else module
        twins[module] = [twin.sharing(plain, pruning) for pruning in settings]
    return twins, reasons
