# SPDX-License-Identifier: BSD-3-Clause
"""Whether pruning pays for a model and a batch on this machine, and what to prune: a plan with a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ._convert import paused, why_plain
from ._layer import PruningLayer, prune_in_place
from ._models import check_module, layers_of
from ._noise import (
    Norm,
    difference,
    samples_of,
    tensors_of,
)
from ._pattern import Pattern, PatternLike, Pruning
from ._plan import Plan
from ._step import Loss, state_kept
from ._study import Memory, Study, UnusableBatch, alike, sparsity
from ._twins import twin_of


def advise(
    model: nn.Module,
    *batches: Any,
    loss: Loss | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    patterns: Iterable[PatternLike] | None = None,
    methods: Iterable[str] = ("mvue",),
    filter: Callable[[nn.Module, str], bool] | None = None,
    rounds: int = 3,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Says whether pruning pays for ``model`` on these batches and this machine, and what to prune.

    Pruning saves a share S of a step's time, and adds noise to the gradient: τ times the noise that the choice of the
    batch brings anyway. The same loss then takes 1 + c τ times the steps, so that the net saving is

        net = 1 - (1 - S) (1 + c τ)

    ``advise`` times the sparse product of each layer's data and weight gradient beside the exact one, measures the
    noise that each would add to the gradient of *all* parameters, and chooses the patterns that make ``net`` largest.
    "Nothing pays here" is an answer: the plan is empty then. The model, its gradients, buffers and PyTorch's generators
    are left as they were.

    Gradients change in training, and those of an untrained model bear pruning worst: run some hundred steps first. The
    model is measured in the mode it is in: call ``model.train()`` before. A step is its forward and backward; the
    optimizer and the loading of data come on top.

    Args:
        model: plain or converted.
        batches: of the data that the model trains on; the first dimension of each tensor is the sample. With one batch,
            its halves are compared; four tell more. Those of another size than the first are left out.
        loss: ``loss(model, batch)`` runs the forward and returns a scalar. Default: see ``sdgp.profile``.
        optimizer: the one that trains the model. If it is Adam or similar and has made steps, noise is measured as it
            scales its steps. Parameters that it does not train are ignored.
        patterns: to try. Default: 16:32, 8:32 and 4:32 on a CPU, where wide groups take no longer than narrow ones and
            add less noise, and half as wide groups where a layer is too narrow; elsewhere 2:4 and 1:4.
        methods: to try. Only ``"mvue"`` is unbiased. Errors of other methods do not average out, and together they are
            larger than the sum of the candidates' noise; that of the whole plan is measured.
        filter: ``filter(module, name) -> bool``: False leaves that layer plain.
        rounds: of timing; the median counts.
        progress: called with the name of each stage as it begins.

    Returns:
        A ``Plan``, for ``sdgp.convert(model, plan)``; ``sdgp.plot`` draws what it was chosen from.

    Raises:
        ValueError: ``advise: requirement, got actual``.

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
    methods: Iterable[str],
    filter: Callable[[nn.Module, str], bool] | None,
    rounds: int,
    say: Callable[[str], None],
    memory: Memory,
) -> Plan:
    """``advise``, with a memory of earlier calls."""
    check_module("advise", model)
    if not batches:
        raise ValueError("advise: expected at least one batch, got none")
    if rounds < 1:
        raise ValueError(f"advise: expected rounds >= 1, got {rounds}")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError("advise: expected the model itself, got what torch.compile made of it, which runs no hooks")
    norm = Norm.of("advise", model, optimizer)
    if any(parameter._post_accumulate_grad_hooks for parameter in norm.scales):
        raise ValueError("advise: expected an optimizer that steps after backward, got hooks that may step within it")
    batches = alike(batches)
    samples = samples_of(batches[0])
    if len(batches) == 1 and (samples is None or samples < 2):
        got = "one whose tensors share no first dimension" if samples is None else f"one of {samples}"
        raise UnusableBatch(f"advise: expected several batches of one size, or one of at least two samples, got {got}")
    memory.fit(batches[0])
    methods = list(dict.fromkeys(methods))
    tried = [
        [Pruning.parse("advise", pattern, method, "auto", (pattern, method)) for method in methods]
        for pattern in (_default_patterns(model) if patterns is None else map(Pattern.parse, patterns))
    ]
    if not any(tried):
        raise ValueError("advise: expected at least one pattern and one method, got none")
    settings = sorted((pruning for row in tried for pruning in row), key=lambda pruning: -sparsity(pruning))
    twins, reasons = _twins(model, settings, filter)
    if not twins:
        raise ValueError("advise: expected a model with layers to prune, got none: see sdgp.report(model)")
    names = {module: name for name, module in layers_of(model)}
    study = Study(model, names, batches, loss, norm, twins, rounds, patterns is None, memory)
    others = [tensor for batch in batches for tensor in tensors_of(batch) if tensor.is_leaf]
    others += [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]
    with state_kept(model, *others), paused(model):
        say("steps")
        study.time_steps()
        say("products")
        study.measure_products()
        say("noise of the batch")
        noise = study.batch_noise()
        say("noise on its way through the layers")
        study.measure_amplifications()
        candidates = study.candidates(noise)
        reasons = {name: reasons[name] if name in reasons else study.why_not(module) for module, name in names.items()}
        notes = study.notes(optimizer, candidates)
        plan = Plan(candidates, reasons, memory.step_ms, norm.kind, noise.error, notes)
        for _ in range(3):
            if not plan.chosen:
                break
            say("the whole plan")
            with _pruned(model, plan):
                pruned = study.gradients(batches[0])
            measured = norm.squared(difference(pruned, study.exact)) / noise.mean
            if plan.take_measured(measured):
                break
    return plan


def _default_patterns(model: nn.Module) -> list[Pattern]:
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu":
        return [Pattern(2, 4), Pattern(1, 4)]
    wide = [Pattern(16, 32), Pattern(8, 32), Pattern(4, 32)]
    return [*wide, *(_half_as_wide(pattern) for pattern in wide)]


def _half_as_wide(pattern: Pattern) -> Pattern:
    return Pattern(pattern.n // 2, pattern.m // 2)


@contextmanager
def _pruned(model: nn.Module, plan: Mapping[str, tuple[Any, ...]]) -> Iterator[None]:
    """Within it, the layers of ``plan`` prune, whatever their products would cost."""
    modules = dict(layers_of(model))
    before = [(modules[name], type(modules[name]), dict(vars(modules[name]))) for name in plan]
    for name, (pattern, method, *weight) in plan.items():
        module = modules[name]
        twin = twin_of(module)
        assert twin is not None  # there is a candidate for it
        prune_in_place(module, twin, Pruning.parse("advise", pattern, method, "dense", *weight))
        module.holds = {}  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, kind, attributes in before:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)


def _twins(
    model: nn.Module, settings: list[Pruning], filter: Callable[[nn.Module, str], bool] | None
) -> tuple[dict[nn.Module, list[PruningLayer]], dict[str, str]]:
    """Makes a twin of each layer for every setting, which shares its Parameters; or says why there is none."""
    twins, reasons = {}, {}
    for name, module in layers_of(model):
        why = why_plain(module, name, Pruning.parse("advise", "1:1", "mvue", "auto"), filter)
        twin = twin_of(module)
        if why is not None or twin is None:
            reasons[name] = str(why)
            continue
        plain = module.to_dense() if isinstance(module, PruningLayer) else module
        twins[module] = [
            twin.from_dense(plain, pruning.pattern, pruning.method, pruning.backend, weight_grad=pruning.weight_grad)
            for pruning in settings
        ]
    return twins, reasons
