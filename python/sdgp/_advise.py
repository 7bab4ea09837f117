# SPDX-License-Identifier: BSD-3-Clause
"""Which layers to prune, and how: the time that a real batch would save against the error it would bring."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _fidelity
from ._choose import LEAST_WORK, current_chooser
from ._convert import paused, why_plain
from ._layer import PruningLayer, prune_in_place
from ._models import check_module, format_table, layers_of
from ._pattern import Pattern, PatternLike, Pruning
from ._step import on_gradient, run_step, stand_in, state_kept
from ._timing import seconds
from ._twins import twin_of


class Candidate(NamedTuple):
    """One layer under one pattern and method: what pruning does to its data gradient, and the milliseconds per step."""

    layer: str
    shape: str  # of the output gradient
    pattern: str
    method: str
    exact_ms: float
    sparse_ms: float | None  # None: there is no sparse product for it here
    saved_ms: float  # by the calls for which the sparse product is the faster by more than noise
    error: float  # see sdgp.watch
    bias: float
    cosine: float


class Point(NamedTuple):
    """What the plan by some ``max_error`` comes to."""

    max_error: float
    error: float  # |p - g| / |g| of all parameters' gradients together, measured in a whole backward
    saved_ms: float


class Plan(dict[str, tuple[str, str]]):
    """What ``sdgp.advise`` proposes: ``{layer: (pattern, method)}``, which ``sdgp.convert`` takes, as it does what
    ``json`` makes of it. Layers that are not in it stay plain. Prints as a table.

    Attributes:
        candidates: everything that was measured, a list of ``Candidate``.
        chosen: those of them that were.
        curve: what other values of ``max_error`` lead to, a list of ``Point`` in ascending order.
        error: of the gradient of all parameters under this plan.
        saved_ms: of a step, by all layers together.
        step_ms: forward and backward of the plain model.
        max_error, max_bias: of the data gradient of a layer, as they were asked for.

    Examples:
        >>> plan = sdgp.advise(torch.nn.Linear(64, 64), torch.randn(8, 64, requires_grad=True))
        >>> [row.pattern for row in plan.candidates]
        ['8:16', '4:16', '4:32']
    """

    def __init__(
        self, candidates: list[Candidate], reasons: dict[str, str], step_ms: float, max_error: float, max_bias: float
    ) -> None:
        self.candidates, self.step_ms, self.max_error, self.max_bias = candidates, step_ms, max_error, max_bias
        self.chosen = _choose(candidates, max_error, max_bias)
        self.curve: list[Point] = []
        self._reasons = reasons  # of every layer; where there are candidates they tell
        super().__init__({row.layer: (row.pattern, row.method) for row in self.chosen})

    @property
    def saved_ms(self) -> float:
        return _saved_ms(self.chosen)

    @property
    def error(self) -> float:
        return next(point.error for point in self.curve if point.max_error == self.max_error)

    def __str__(self) -> str:
        head = ("layer", "gradient", "proposed", "exact ms", "sparse ms", "saved ms", "error", "bias", "cosine")
        lines = format_table(head, self._rows())
        lines.append(
            f"step: exact {self.step_ms:.2f} ms, {self.saved_ms:.2f} ms ({self.saved_ms / self.step_ms:.1%}) saved by "
            f"{len(self)} layers at max_error={self.max_error:g}; error of the parameters' gradient {self.error:.3f}"
        )
        return "\n".join(lines)

    __repr__ = __str__

    def _rows(self) -> Iterator[tuple[str, ...]]:
        measured = {row.layer: row for row in reversed(self.candidates)}
        chosen = {row.layer: row for row in self.chosen}
        for layer in self._reasons:
            row = chosen.get(layer)
            name = layer or "(model)"
            if row is not None and row.sparse_ms is not None:
                times = (f"{value:.3f}" for value in (row.exact_ms, row.sparse_ms, row.saved_ms))
                fidelity = (f"{value:.3f}" for value in (row.error, row.bias, row.cosine))
                yield name, row.shape, f"{row.pattern} {row.method}", *times, *fidelity
            else:
                shape = measured[layer].shape if layer in measured else ""
                yield name, shape, f"plain: {self._why_plain(layer)}", *[""] * 6

    def _why_plain(self, layer: str) -> str:
        rows = [row for row in self.candidates if row.layer == layer]
        if not rows:
            return self._reasons[layer]
        if all(row.sparse_ms is None for row in rows):
            return "no sparse product here"
        if all(row.saved_ms <= 0 for row in rows):
            return "sparse is not faster"
        faster = [row for row in rows if row.saved_ms > 0]
        if all(row.bias > self.max_bias for row in faster):
            return f"what is faster has bias > {self.max_bias:g}"
        return f"what is faster has error > {self.max_error:g}"


def _choose(candidates: Iterable[Candidate], max_error: float, max_bias: float) -> list[Candidate]:
    """Of each layer what saves most, of what the limits allow."""
    best: dict[str, Candidate] = {}
    for row in candidates:
        fits = row.error <= max_error and row.bias <= max_bias
        if fits and row.saved_ms > (best[row.layer].saved_ms if row.layer in best else 0.0):
            best[row.layer] = row
    return list(best.values())


def _saved_ms(rows: Iterable[Candidate]) -> float:
    return math.fsum(row.saved_ms for row in rows)


def advise(
    model: nn.Module,
    *batches: Any,
    loss: Callable[[Any], Tensor] | None = None,
    patterns: Iterable[PatternLike] | None = None,
    methods: Iterable[str] = ("mvue",),
    max_error: float = 0.75,
    max_bias: float = 0.2,
    filter: Callable[[nn.Module, str], bool] | None = None,
    rounds: int = 5,
) -> Plan:
    """Proposes a pattern and a method for each layer of ``model``: what saves most time at a bearable error.

    Runs exact forwards and backwards on ``batches``; at each layer's gradient, every pattern and method is timed
    against the exact product and compared with the exact data gradient. Each layer gets what saves most among what its
    error and bias allow, or stays plain. Then whole backwards under that plan, and under those of other limits, tell
    how far the parameters' gradient is from the exact one. The model, its gradients, buffers and PyTorch's generators
    are left as they were. Weight gradients are exact in all of it, and in the plan.

    Args:
        model: plain or converted.
        batches: each what the model is called with: a tensor, a tuple of positional or a mapping of keyword arguments.
        loss: from the model's output to a scalar; default: see ``sdgp.profile``.
        patterns: to try. Default: 2:4, 1:4 and 4:32; on a CPU, which takes as long for wider groups of the same
            density, 8:16, 4:16 and 4:32.
        methods: to try. magnitude and rescale have smaller errors than mvue, all of them bias.
        max_error: |p - g| / |g| of a layer's data gradient, at most.
        max_bias: of the same, |E p - g| / |g|; estimated, so that an unbiased method shows some.
        filter: ``filter(module, name) -> bool``: False leaves that layer plain.
        rounds: of measuring; the median counts.

    Returns:
        A ``Plan``, for ``sdgp.convert(model, plan)``; ``sdgp.plot`` draws what it was chosen from.

    Raises:
        ValueError: ``advise: requirement, got actual``.

    Examples:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> plan = sdgp.advise(model, torch.randn(8, 64))
        >>> model = sdgp.convert(model, plan)
    """
    check_module("advise", model)
    if not batches:
        raise ValueError("advise: expected at least one batch, got none")
    if rounds < 1:
        raise ValueError(f"advise: expected rounds >= 1, got {rounds}")
    settings = [
        Pruning.parse("advise", pattern, method, "auto")
        for pattern in (_patterns_for(model) if patterns is None else patterns)
        for method in dict.fromkeys(methods)
    ]
    if not settings:
        raise ValueError("advise: expected at least one pattern and one method, got none")
    twins, reasons = _twins(model, settings, filter)
    if not twins:
        raise ValueError("advise: expected a model with layers to prune, got none: see sdgp.report(model)")
    tally = _Tally(twins, rounds)
    with state_kept(model), paused(model):
        step_ms = _step_ms(model, batches, loss, rounds)
        with on_gradient(twins, tally.receive):
            for batch in batches:
                run_step("advise", model, batch, loss)
    names = {module: name for name, module in layers_of(model)}
    candidates = [row for module in twins for row in tally.candidates(module, names[module], len(batches))]
    reasons = {name: reasons.get(name, "no data gradient") for name in names.values()}  # in the model's order
    plan = Plan(candidates, reasons, step_ms, max_error, max_bias)
    plan.curve = _curve(model, batches, loss, plan)
    return plan


def _patterns_for(model: nn.Module) -> list[Pattern]:
    """To try by default."""
    patterns = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 32)]
    parameter = next(model.parameters(), None)
    if parameter is None or parameter.device.type != "cpu":
        return patterns
    return [pattern.wider or pattern for pattern in patterns]


# Points of a curve: each costs a step.
_POINTS = 8


def _curve(model: nn.Module, batches: tuple[Any, ...], loss: Callable[[Any], Tensor] | None, plan: Plan) -> list[Point]:
    """Of the plan's own limit, and of others between the one that allows nothing and the one that allows all."""
    worth = [row for row in plan.candidates if row.saved_ms > 0 and row.bias <= plan.max_bias]
    limits = sorted({row.error for row in worth if math.isfinite(row.error)})
    limits = [limits[round(index * (len(limits) - 1) / (_POINTS - 1))] for index in range(_POINTS if limits else 0)]
    choices = {
        limit: _choose(plan.candidates, limit, plan.max_bias) for limit in sorted({0.0, plan.max_error, *limits})
    }
    errors = _parameter_errors(model, batches, loss, list(choices.values()))
    return [Point(limit, error, _saved_ms(rows)) for (limit, rows), error in zip(choices.items(), errors, strict=True)]


def _parameter_errors(
    model: nn.Module,
    batches: tuple[Any, ...],
    loss: Callable[[Any], Tensor] | None,
    choices: list[list[Candidate]],
) -> list[float]:
    """|p - g| / |g| of all parameters' gradients together, for every choice of what is pruned."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def gradients(batch: Any) -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        with torch.random.fork_rng():  # the same dropout every time
            run_step("advise", model, batch, loss)
        return [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in parameters]

    error2, exact2 = [0.0] * len(choices), 0.0
    with state_kept(model), paused(model):
        for batch in batches:
            exact = gradients(batch)
            exact2 += sum(float(value.double().square().sum()) for value in exact)
            for index, rows in enumerate(choices):
                with _pruned(model, rows):
                    pairs = zip(gradients(batch), exact, strict=True)
                    error2[index] += sum(float((pruned - value).double().square().sum()) for pruned, value in pairs)
    return [math.sqrt(error / exact2) if exact2 else math.nan for error in error2]


@contextmanager
def _pruned(model: nn.Module, rows: Iterable[Candidate]) -> Iterator[None]:
    """Within it, the layers of ``rows`` prune."""
    modules = dict(layers_of(model))
    before = [(modules[row.layer], type(modules[row.layer]), dict(vars(modules[row.layer]))) for row in rows]
    for row in rows:
        module, pruning = modules[row.layer], Pruning.parse("advise", row.pattern, row.method, "dense")
        twin = twin_of(module)
        assert twin is not None  # there is a candidate for it
        prune_in_place(module, twin, pruning)
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
    """Of each layer a twin per setting, which shares its Parameters; and why there is none."""
    twins, reasons = {}, {}
    for name, module in layers_of(model):
        whys = [why_plain(module, name, pruning, filter) for pruning in settings]
        twin = twin_of(module)
        dense = module.to_dense() if isinstance(module, PruningLayer) and None in whys else module
        made = [
            twin.from_dense(dense, pruning.pattern, pruning.method, pruning.backend)
            for pruning, why in zip(settings, whys, strict=True)
            if twin is not None and why is None
        ]
        if made:
            twins[module] = made
        else:
            reasons[name] = str(whys[0])
    return twins, reasons


class _Tally:
    """What the calls of each layer add up to."""

    def __init__(self, twins: dict[nn.Module, list[PruningLayer]], rounds: int) -> None:
        self._twins, self._rounds = twins, rounds
        self._shapes: dict[nn.Module, str] = {}
        self._sums: dict[PruningLayer, list[list[float]]] = {}
        self._times: dict[PruningLayer, list[tuple[float, float | None, float]]] = {}

    def receive(self, module: nn.Module, grad_output: Tensor, shape: Tensor) -> None:
        self._shapes.setdefault(module, str(tuple(grad_output.shape)))
        for twin in self._twins[module]:
            sums = self._sums.setdefault(twin, [])
            sums.append(_fidelity.measure(twin, grad_output, shape, len(sums)).tolist())
            self._times.setdefault(twin, []).append(self._time(twin, grad_output, shape))

    def candidates(self, module: nn.Module, name: str, batches: int) -> Iterator[Candidate]:
        for twin in self._twins[module] if module in self._shapes else ():  # called, with a data gradient
            values = _fidelity.metrics(_fidelity.add(self._sums[twin]))
            exact, sparse, saved = zip(*self._times[twin], strict=True)
            times = [value for value in sparse if value is not None]
            yield Candidate(
                name,
                self._shapes[module],
                str(twin.pruning.pattern),
                twin.pruning.method,
                sum(exact) / batches,
                sum(times) / batches if times else None,
                sum(saved) / batches,
                values["error"],
                values["bias"],
                values["cosine"],
            )

    def _time(self, twin: PruningLayer, grad_output: Tensor, shape: Tensor) -> tuple[float, float | None, float]:
        """Milliseconds of the exact and of the sparse product, and what the layer would save."""
        products = twin.products(grad_output, stand_in(shape, grad_output))
        if products.obstacle() is not None:
            return 0.0, None, 0.0
        decision = current_chooser().measure(products, twin.pruning, self._rounds)
        exact, sparse = decision.exact_ms or 0.0, decision.sparse_ms
        saves = sparse is not None and decision.prunes and products.work >= LEAST_WORK
        return exact, sparse, exact - (sparse or 0.0) if saves else 0.0


def _step_ms(model: nn.Module, batches: tuple[Any, ...], loss: Callable[[Any], Tensor] | None, rounds: int) -> float:
    device = next(model.parameters()).device

    def step() -> None:
        for batch in batches:
            run_step("advise", model, batch, loss)

    step()  # warms up
    return 1e3 * statistics.median(seconds(step, device) for _ in range(rounds)) / len(batches)
