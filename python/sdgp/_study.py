# SPDX-License-Identifier: BSD-3-Clause
"""The measurements of ``sdgp.advise``: the times of each gradient's products, and the noise that pruning it adds."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ._choose import LEAST_WORK, current_chooser
from ._decision import Decision, Products
from ._layer import PruningLayer
from ._noise import (
    Errors,
    Estimate,
    Gradients,
    Norm,
    amplifications,
    batch_noise,
    errors,
    noise_of_halves,
    part_of,
    samples_of,
    tensors_of,
)
from ._pattern import UNBIASED_METHODS, Pruning
from ._plan import Candidate
from ._step import Loss, compute_loss, on_gradient, stand_in
from ._timing import seconds

#: The saving by bfloat16 from which a note mentions it. Smaller ones may be measuring errors.
LEAST_HINT = 0.1


class UnusableBatch(ValueError):
    """Raised if a batch gives no advice. Another batch may give advice."""


@dataclass
class Memory:
    """The times that one call of ``advised`` keeps for the next call. They hold for batches of one size."""

    step_ms: float = math.nan
    decisions: dict[str, Decision] = field(default_factory=dict)  # by layer, call and pruning
    values: int = 0  # the number of values in the batch

    def fit(self, batch: Any) -> None:
        """Drops the times if ``batch`` has another size."""
        values = sum(tensor.numel() for tensor in tensors_of(batch))
        if not 0.9 * self.values <= values <= 1.1 * self.values:
            self.step_ms, self.decisions, self.values = math.nan, {}, values


def sparsity(pruning: Pruning) -> float:
    return 1 - pruning.pattern.n / pruning.pattern.m


class _Measured:
    """The measurements of one gradient of one layer under one setting, summed over the calls in a step."""

    def __init__(self) -> None:
        self.errors = Errors()
        self.exact_ms = self.sparse_ms = self.saved_ms = 0.0
        self.timed = False


class Study:
    """Runs the measurements of ``advise`` in stages and keeps their results."""

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
        self._alike: dict[str, Decision] = {}  # by shapes and pruning: many networks repeat their layers
        self._shapes: dict[nn.Module, str] = {}
        self._largest = 0  # multiply-adds of the largest product
        self._obstacles: dict[nn.Module, str] = {}
        self._amplified: dict[nn.Module, float] = {}
        self._without_gradient = 0
        self._bfloat16_saved = 0.0
        self._unmeasured = ""  # why the noise of data gradients could not be measured
        self.exact: Gradients = {}

    def gradients(self, batch: Any, autocast: torch.dtype | None = None) -> dict[nn.Parameter, Tensor]:
        """Returns the gradients of the trained parameters. Every call draws the same dropout.

        Args:
            autocast: the dtype of an autocast around the forward. With None, there is none.
        """
        parameters = list(self._norm.scales)
        for parameter in parameters:
            parameter.grad = None
        with torch.random.fork_rng():
            with nullcontext() if autocast is None else torch.autocast("cpu", autocast):
                value = compute_loss("advise", self._model, batch, self._loss)
            if not torch.isfinite(value):
                raise UnusableBatch(f"advise: expected a finite loss, got {value.item()}")
            torch.autograd.backward(value)
        self._without_gradient = sum(parameter.grad is None for parameter in parameters)
        return {p: torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters}

    def time_steps(self) -> None:
        """Times a step, unless ``memory`` has the time from an earlier call."""
        if math.isfinite(self._memory.step_ms):
            return

        def step() -> None:
            self.gradients(self._batches[0])

        step()  # warms up
        device = next(iter(self._norm.scales)).device
        self._memory.step_ms = 1e3 * statistics.median(seconds(step, device) for _ in range(self._rounds))
        # Without AVX-512, PyTorch's bfloat16 products on x86 take some twenty times as long.
        if device.type == "cpu" and "AVX512" in torch.backends.cpu.get_cpu_capability():
            self._bfloat16_saved = self._saved_by_bfloat16(device)

    def _saved_by_bfloat16(self, device: torch.device) -> float:
        """Returns the share of a step's time that autocast to bfloat16 saves, or 0 if the model does not run under it.

        It saves nothing where ``loss`` has its own autocast.
        """

        def step() -> None:
            self.gradients(self._batches[0], torch.bfloat16)

        times: list[float] = []
        try:
            for _ in range(1 + self._rounds):  # the first one warms up
                times.append(1e3 * seconds(step, device))
                if times[0] > 2 * self._memory.step_ms:
                    return 0.0
        except Exception:  # a loss may do anything that bfloat16 does not support; then there is no hint
            return 0.0
        return 1 - statistics.median(times[1:]) / self._memory.step_ms

    def batch_noise(self) -> Estimate:
        """Estimates the noise of the batch from several batches, or from the halves of a single one."""
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
        """Measures the time and noise of all candidates, in a backward that also computes the exact gradients."""
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
        slower: set[str] = set()  # methods whose sparser pattern saves nothing: denser ones are not timed
        for twin in twins:
            measured = found.setdefault(twin, _Measured())
            products = _products(twin, gradient, grad_output, input)
            self._time(module, measured, products, input, twin, gradient, slower)
        useful = [twin for twin in twins if found[twin].saved_ms > 0]
        if not useful:
            return
        some = _some(module, grad_output)
        part = grad_output[some]
        energy = (float(torch.linalg.vector_norm(values, dtype=torch.float32)) ** 2 for values in (grad_output, part))
        whole, seen = energy
        if seen < whole / 16:  # most of the gradient is in the other samples
            some, part, seen = slice(None), grad_output, whole
        ways = [_products(twin, gradient, part, input[some]) for twin in useful]
        methods = [twin.pruning.method for twin in useful]
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        squared = (lambda error: self._norm.squared_of(weight, error)) if gradient == "weight" else None
        for twin, sums in zip(useful, errors(ways, methods, len(self._found), squared), strict=True):
            times = whole / seen if seen else 1.0  # squared errors add up over the samples
            found[twin].errors += tuple(times * value for value in sums)

    def _time(
        self,
        module: nn.Module,
        measured: _Measured,
        products: Products,
        input: Tensor,
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
            shapes = f"{_shapes(module, products.grad_output, input)} {gradient} {pruning.pattern} {pruning.method}"
            if shapes not in self._alike:
                self._alike[shapes] = self._decide(products, pruning)
            decision = self._memory.decisions[key] = self._alike[shapes]
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
        except RuntimeError as error:  # out of memory, or a library does not support this size
            return Decision("exact", str(error))

    def measure_amplifications(self) -> None:
        """Measures how the noise of data gradients is amplified, on a quarter of the first batch.

        The amplification does not depend on the number of samples. If the model rejects a part of the batch, the whole
        batch is used.
        """
        batch, samples = self._batches[0], samples_of(self._batches[0])
        parts = [] if samples is None else [part_of(batch, 0, max(-(-samples // 4), min(samples, 8)))]
        for part in (*parts, batch):
            try:
                return self._measure_amplifications(part)
            except RuntimeError as error:  # for example from a reentrant checkpoint or a compiled submodule
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
        """Returns why a layer was not measured."""
        if module not in self._shapes:
            return "no gradient"
        return self._obstacles.get(module, "too small to gain")

    def _idle(self, optimizer: torch.optim.Optimizer | None) -> int:
        """Returns the number of parameters that require a gradient and are in no group of the optimizer."""
        if optimizer is None:
            return 0
        used = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        return sum(p.requires_grad and p not in used for p in self._model.parameters())

    def notes(self, optimizer: torch.optim.Optimizer | None, rows: list[Candidate]) -> list[str]:
        notes = []
        if self._bfloat16_saved > LEAST_HINT:
            saved = f"{self._bfloat16_saved:.0%}"
            notes.append(
                f"plain bfloat16 saves {saved} of a step: use torch.autocast inside loss= first, and ask again"
            )
        if len(self._batches) == 1:
            notes.append("one batch gives the noise only to a factor of about two: pass more batches")
        if optimizer is not None and self._norm.kind == "euclidean" and "betas" in optimizer.defaults:
            notes.append("noise is measured in the Euclidean norm: the optimizer is not Adam, or has made no step")
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
            notes.append(f"the largest layer is too small to gain: use a batch {times} times as large")
        if any(row.method not in UNBIASED_METHODS for row in rows):
            notes.append("methods other than mvue are biased: their errors do not average out")
        return notes


def alike(batches: Sequence[Any]) -> list[Any]:
    """Returns the batches with as many samples as the first one: gradients of smaller batches are noisier."""
    return [batch for batch in batches if samples_of(batch) == samples_of(batches[0])]


def _products(twin: PruningLayer, gradient: str, grad_output: Tensor, input: Tensor) -> Products:
    return twin.products(grad_output, input) if gradient == "data" else twin.weight_products(grad_output, input)


def _shapes(module: nn.Module, *tensors: Tensor) -> str:
    """Describes all that the time of a layer's products depends on, except the pruning."""
    geometry = [getattr(module, name, None) for name in ("stride", "padding", "dilation", "groups")]
    weight = module.weight
    assert isinstance(weight, Tensor)
    layouts = [(tensor.dtype, tuple(tensor.shape), tensor.stride()) for tensor in (*tensors, weight)]
    return f"{type(module).__name__} {geometry} {layouts}"


def _fits(twin: PruningLayer, gradient: str, grad_output: Tensor) -> bool:
    """Whether a gradient has at least one whole group of the twin's pattern."""
    if gradient == "data":
        return type(twin).too_narrow(twin, twin.pruning.pattern) is None
    if isinstance(twin, nn.Conv2d):
        along = grad_output.shape[-1] * grad_output.shape[-2]
    else:
        along = grad_output.numel() // max(grad_output.shape[-1], 1)
    return along >= twin.pruning.pattern.m


def _widest(twins: list[PruningLayer]) -> list[PruningLayer]:
    """Returns the twins with the widest pattern for each density and method."""
    widest: dict[tuple[float, str], PruningLayer] = {}
    for twin in twins:
        key = (sparsity(twin.pruning), twin.pruning.method)
        if key not in widest or twin.pruning.pattern.m > widest[key].pruning.pattern.m:
            widest[key] = twin
    return list(widest.values())


def _some(module: nn.Module, grad_output: Tensor) -> slice:
    """Returns which samples to measure: every fourth one of a large batch, because more would add little."""
    if grad_output.ndim == (3 if isinstance(module, nn.Conv2d) else 1):
        return slice(None)  # without a batch dimension: these are channels or features
    least = 256 if grad_output.ndim == 2 else 4
    return slice(0, None, 4 if grad_output.shape[0] >= least else 1)
