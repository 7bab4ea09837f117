# SPDX-License-Identifier: BSD-3-Clause
"""Whether pruning pays for a model and a batch on this machine, and what to prune: a plan with a verdict."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._choose import LEAST_WORK, current_chooser
from ._convert import paused, why_plain
from ._decision import Decision, Products
from ._layer import PruningLayer, prune_in_place
from ._models import check_module, layers_of
from ._noise import (
    Errors,
    Estimate,
    Gradients,
    Norm,
    amplifications,
    batch_noise,
    difference,
    errors,
    noise_of_halves,
    part_of,
    samples_of,
    tensors_of,
)
from ._pattern import UNBIASED_METHODS, Pattern, PatternLike, Pruning
from ._plan import Candidate, Plan
from ._step import Loss, compute_loss, on_gradient, stand_in, state_kept
from ._timing import seconds
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


class UnusableBatch(ValueError):
    """This batch gives no advice; another one may."""


@dataclass
class Memory:
    """What one call of ``advised`` leaves for the next: what took how long, for batches of one size."""

    step_ms: float = math.nan
    decisions: dict[str, Decision] = field(default_factory=dict)  # what each product took, by layer, call and pruning
    values: int = 0  # in the batch

    def fit(self, batch: Any) -> None:
        """Forgets the times if ``batch`` is of another size."""
        values = sum(tensor.numel() for tensor in tensors_of(batch))
        if not 0.9 * self.values <= values <= 1.1 * self.values:
            self.step_ms, self.decisions, self.values = math.nan, {}, values


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
    batches = _alike(batches)
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
    settings = sorted((pruning for row in tried for pruning in row), key=lambda pruning: -_sparsity(pruning))
    twins, reasons = _twins(model, settings, filter)
    if not twins:
        raise ValueError("advise: expected a model with layers to prune, got none: see sdgp.report(model)")
    names = {module: name for name, module in layers_of(model)}
    study = _Study(model, names, batches, loss, norm, twins, rounds, patterns is None, memory)
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


def _sparsity(pruning: Pruning) -> float:
    return 1 - pruning.pattern.n / pruning.pattern.m


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


class _Measured:
    """One gradient of one layer under one setting, over the calls of a step."""

    def __init__(self) -> None:
        self.errors = Errors()
        self.exact_ms = self.sparse_ms = self.saved_ms = 0.0
        self.timed = False


class _Study:
    """What ``advise`` measures, stage by stage."""

    def __init__(
        self,
        model: nn.Module,
        names: Mapping[nn.Module, str],
        batches: Sequence[Any],
        loss: Loss | None,
        norm: Norm,
        twins: dict[nn.Module, list[PruningLayer]],
        rounds: int,
        narrow_for_wide: bool,
        memory: Memory,
    ) -> None:
        self._model, self._names, self._batches, self._loss, self._norm = model, names, batches, loss, norm
        self._twins, self._rounds, self._narrow_for_wide, self._memory = twins, rounds, narrow_for_wide, memory
        self._found: dict[tuple[nn.Module, str], dict[PruningLayer, _Measured]] = {}
        self._calls: Counter[tuple[nn.Module, str]] = Counter()
        self._shapes: dict[nn.Module, str] = {}
        self._largest = 0  # multiply-adds of a product
        self._obstacles: dict[nn.Module, str] = {}
        self._amplified: dict[nn.Module, float] = {}
        self._without_gradient = 0
        self._unmeasured = ""  # why the noise of data gradients is not known
        self.exact: Gradients = {}

    def gradients(self, batch: Any) -> dict[nn.Parameter, Tensor]:
        """The gradients of the trained parameters, with the same dropout every time."""
        parameters = list(self._norm.scales)
        for parameter in parameters:
            parameter.grad = None
        with torch.random.fork_rng():
            value = compute_loss("advise", self._model, batch, self._loss)
            if not torch.isfinite(value):
                raise UnusableBatch(f"advise: expected a finite loss, got {value.item()}")
            torch.autograd.backward(value)
        self._without_gradient = sum(parameter.grad is None for parameter in parameters)
        return {p: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters}

    def time_steps(self) -> None:
        """What a step takes, unless an earlier call has told."""
        if math.isfinite(self._memory.step_ms):
            return

        def step() -> None:
            self.gradients(self._batches[0])

        step()  # warms up
        device = next(iter(self._norm.scales)).device
        self._memory.step_ms = 1e3 * statistics.median(seconds(step, device) for _ in range(self._rounds))

    def batch_noise(self) -> Estimate:
        """The noise of the batch, from several batches or from the halves of one."""
        if len(self._batches) > 1:
            estimate = batch_noise((self.exact, *map(self.gradients, self._batches[1:])), self._norm)
        else:
            batch = self._batches[0]
            half = (samples_of(batch) or 0) // 2
            one, other = self.gradients(part_of(batch, 0, half)), self.gradients(part_of(batch, half, 2 * half))
            estimate = noise_of_halves(self.exact, one, other, self._norm)
        if not 0 < estimate.mean < math.inf:
            raise UnusableBatch(f"advise: expected batches whose gradients differ, got a variance of {estimate.mean}")
        return estimate

    def measure_products(self) -> None:
        """Time and noise of every gradient's candidates, in a backward that also gives the exact gradients."""
        with on_gradient(self._twins, self._receive, weights=True):
            self.exact = self.gradients(self._batches[0])

    def _receive(self, module: nn.Module, grad_output: Tensor, input: Tensor) -> None:
        self._shapes.setdefault(module, str(tuple(grad_output.shape)))
        if input.requires_grad:
            shape = stand_in(input, grad_output)
            self._measure(module, "data", grad_output, shape)
        if module.weight in self._norm.scales and input.device.type != "meta":
            self._measure(module, "weight", grad_output, input.detach())

    def _measure(self, module: nn.Module, gradient: str, grad_output: Tensor, input: Tensor) -> None:
        twins = [twin for twin in self._twins[module] if _fits(twin, gradient, grad_output)]
        if self._narrow_for_wide:
            twins = _widest(twins)
        if not twins:
            return
        found = self._found.setdefault((module, gradient), {})
        self._calls[module, gradient] += 1
        slower: set[str] = set()  # methods for which a sparser pattern saves nothing
        for twin in twins:
            measured = found.setdefault(twin, _Measured())
            self._time(module, measured, _products(twin, gradient, grad_output, input), twin, gradient, slower)
        useful = [twin for twin in twins if found[twin].saved_ms > 0]
        if not useful:
            return
        some = _some(module, grad_output)
        part = grad_output[some]
        energy = (float(torch.linalg.vector_norm(values, dtype=torch.float32)) ** 2 for values in (grad_output, part))
        whole, seen = energy
        if seen < whole / 16:  # most of the gradient is elsewhere
            some, part, seen = slice(None), grad_output, whole
        ways = [_products(twin, gradient, part, input[some]) for twin in useful]
        methods = [twin.pruning.method for twin in useful]
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        squared = (lambda error: self._norm.squared_of(weight, error)) if gradient == "weight" else None
        for twin, sums in zip(useful, errors(ways, methods, len(self._found), squared), strict=True):
            times = whole / seen if seen else 1.0  # the squares of the samples' errors add up
            found[twin].errors += tuple(times * value for value in sums)

    def _time(
        self,
        module: nn.Module,
        measured: _Measured,
        products: Products,
        twin: PruningLayer,
        gradient: str,
        slower: set[str],
    ) -> None:
        self._largest = max(self._largest, products.work)
        pruning = twin.pruning.data if gradient == "data" else twin.pruning.weight
        assert pruning is not None
        if (missing := products.obstacle()) is not None:
            self._obstacles[module] = f"a sparse product needs {missing}"
            return
        least = max(current_chooser().least_work(products.grad_output.device), LEAST_WORK)
        if products.work < least or pruning.method in slower:
            return
        call = f"{self._names[module]}, call {self._calls[module, gradient]}"
        key = f"{call}: {gradient} {pruning.pattern} {pruning.method}"
        decision = self._memory.decisions.get(key)
        if decision is None:
            decision = self._memory.decisions[key] = self._decide(products, pruning)
        measured.timed = True
        measured.exact_ms += decision.exact_ms or 0.0
        measured.sparse_ms += decision.sparse_ms or 0.0
        if decision.prunes:
            measured.saved_ms += (decision.exact_ms or 0.0) - (decision.sparse_ms or 0.0)
        else:
            slower.add(pruning.method)

    def _decide(self, products: Products, pruning: Pruning) -> Decision:
        try:
            return current_chooser().measure(products, pruning, self._rounds)
        except RuntimeError as error:  # out of memory, or a library that refuses this size
            return Decision("exact", str(error))

    def measure_amplifications(self) -> None:
        """On a quarter of the first batch: what an error becomes does not depend on the number of samples. Or on the
        whole of it, where the model does not take a part."""
        batch, samples = self._batches[0], samples_of(self._batches[0])
        parts = [] if samples is None else [part_of(batch, 0, max(-(-samples // 4), min(samples, 8)))]
        for part in (*parts, batch):
            try:
                return self._measure_amplifications(part)
            except RuntimeError as error:  # such as of a reentrant checkpoint, or a compiled submodule
                self._unmeasured = str(error).partition("\n")[0]

    def _measure_amplifications(self, batch: Any) -> None:
        layers = {}
        for (module, gradient), found in self._found.items():
            useful = [twin for twin, measured in found.items() if measured.saved_ms > 0]
            if gradient == "data" and useful:
                layers[module] = useful[len(useful) // 2]

        def make_error(module: nn.Module, grad_output: Tensor) -> Tensor:
            twin = layers[module]
            products = twin.products(grad_output, stand_in(shapes[module], grad_output))
            return products.dense(torch.zeros(1, dtype=torch.int64, device=grad_output.device)) - products.exact()

        shapes: dict[nn.Module, Tensor] = {}

        def note_shape(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            input = (*args, *kwargs.values())[0]
            shapes[module] = torch.empty_strided(input.shape, input.stride(), device="meta")

        if layers:
            handles = [layer.register_forward_hook(note_shape, with_kwargs=True) for layer in layers]
            try:
                self._amplified = amplifications(
                    layers, self._norm, lambda: compute_loss("advise", self._model, batch, self._loss), make_error
                )
            finally:
                for handle in handles:
                    handle.remove()

    def candidates(self, batch: Estimate) -> list[Candidate]:
        rows = []
        for (module, gradient), found in self._found.items():
            for twin, measured in found.items():
                if measured.saved_ms <= 0:
                    noise = math.nan
                elif gradient == "data":
                    noise = self._amplified.get(module, math.nan) * measured.errors.error2
                else:
                    noise = measured.errors.noise
                rows.append(
                    Candidate(
                        self._names[module],
                        gradient,
                        self._shapes[module],
                        str(twin.pruning.pattern),
                        twin.pruning.method,
                        measured.exact_ms,
                        measured.sparse_ms if measured.timed else None,
                        measured.saved_ms,
                        noise / batch.mean if batch.mean else math.inf,
                        measured.errors.error,
                        measured.errors.bias,
                    )
                )
        order = {name: index for index, name in enumerate(self._names.values())}
        return sorted(rows, key=lambda row: (order[row.layer], row.gradient))

    def why_not(self, module: nn.Module) -> str:
        """Why a layer was not measured, if it was not."""
        if module not in self._shapes:
            return "no gradient"
        return self._obstacles.get(module, "too small to gain")

    def _idle(self, optimizer: torch.optim.Optimizer | None) -> int:
        """Parameters that require a gradient and are in no group of the optimizer."""
        if optimizer is None:
            return 0
        used = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        return sum(p.requires_grad and p not in used for p in self._model.parameters())

    def notes(self, optimizer: torch.optim.Optimizer | None, rows: list[Candidate]) -> list[str]:
        notes = []
        if len(self._batches) == 1:
            notes.append("one batch alone tells the noise to a factor of about two: pass more")
        if optimizer is not None and self._norm.kind == "euclidean" and "betas" in optimizer.defaults:
            notes.append("noise is not measured as this optimizer scales its steps: it is not Adam, or has made none")
        if self._unmeasured and not self._amplified:
            notes.append(f"the noise of data gradients could not be measured: {self._unmeasured}")
        if self._without_gradient:
            notes.append(f"parameters that get no gradient: {self._without_gradient}; set requires_grad=False")
        idle = self._idle(optimizer)
        if idle:
            notes.append(f"parameters with a gradient that the optimizer does not use: {idle}; set requires_grad=False")
        useless = [self._names[module] or "(model)" for module, factor in self._amplified.items() if factor == 0]
        if useless:
            listed = ", ".join(useless[:3]) + (", …" if len(useless) > 3 else "")
            notes.append(f"the data gradient of {listed} reaches no trained parameter: detach the input")
        if 0 < self._largest < LEAST_WORK and all(row.sparse_ms is None for row in rows):
            times = math.ceil(LEAST_WORK / self._largest)
            notes.append(f"the largest layer is too small to gain: try a batch {times} times as large")
        if any(row.method not in UNBIASED_METHODS for row in rows):
            notes.append("methods other than mvue are biased: their errors do not average out as noise does")
        return notes


def _alike(batches: Sequence[Any]) -> list[Any]:
    """Those with as many samples as the first: the gradients of smaller ones are noisier."""
    return [batch for batch in batches if samples_of(batch) == samples_of(batches[0])]


def _products(twin: PruningLayer, gradient: str, grad_output: Tensor, input: Tensor) -> Products:
    return twin.products(grad_output, input) if gradient == "data" else twin.weight_products(grad_output, input)


def _fits(twin: PruningLayer, gradient: str, grad_output: Tensor) -> bool:
    """Whether a gradient has a whole group of the twin's pattern."""
    if gradient == "data":
        return type(twin).too_narrow(twin, twin.pruning.pattern) is None
    if isinstance(twin, nn.Conv2d):
        along = grad_output.shape[-1] * grad_output.shape[-2]
    else:
        along = grad_output.numel() // max(grad_output.shape[-1], 1)
    return along >= twin.pruning.pattern.m


def _widest(twins: list[PruningLayer]) -> list[PruningLayer]:
    """Keeps the widest pattern of each density and method."""
    widest: dict[tuple[float, str], PruningLayer] = {}
    for twin in twins:
        key = (_sparsity(twin.pruning), twin.pruning.method)
        if key not in widest or twin.pruning.pattern.m > widest[key].pruning.pattern.m:
            widest[key] = twin
    return list(widest.values())


def _some(module: nn.Module, grad_output: Tensor) -> slice:
    """The samples that are looked at: every fourth, for more would tell little more."""
    if grad_output.ndim == (3 if isinstance(module, nn.Conv2d) else 1):
        return slice(None)  # not batched: these are channels or features
    least = 256 if grad_output.ndim == 2 else 4
    return slice(0, None, 4 if grad_output.shape[0] >= least else 1)
