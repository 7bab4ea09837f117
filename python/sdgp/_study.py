# SPDX-License-Identifier: BSD-3-Clause
"""The measurements of ``sdgp.advise``: the times of each gradient's products, and the noise that pruning it adds."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._choose import current_chooser
from ._decision import Decision, Products
from ._layer import PruningLayer
from ._noise import Errors, Estimate, Gradients, amplifications, errors, part_of, samples_of, squared_norm
from ._pattern import Pruning
from ._plan import TOO_SMALL, Candidate
from ._rules import LEAST_WORK
from ._step import Handles, on_gradient, stand_in
from ._steps import Steps


def sparsity(pruning: Pruning) -> float:
    return 1 - pruning.pattern.n / pruning.pattern.m


class _Measured:
    """The measurements of one gradient of one layer under one setting, summed over the calls in a step."""

    def __init__(self) -> None:
        self.errors = Errors()
        self.exact_ms = self.sparse_ms = self.saved_ms = 0.0
        self.timed = False


class Study:
    """Measures the products of every candidate, in stages, and keeps the results.

    Attributes:
        names: the layers' names.
        exact: the exact gradients of the first batch.
        amplified: by layer, how the noise of its data gradient is amplified on its way to the parameters.
        unmeasured: why that could not be measured.
        largest_work: the multiply-adds of the largest product.
    """

    def __init__(
        self,
        steps: Steps,
        names: Mapping[nn.Module, str],
        twins: dict[nn.Module, list[PruningLayer]],
        narrow_for_wide: bool,
    ) -> None:
        self._steps, self.names, self._twins, self._narrow_for_wide = steps, names, twins, narrow_for_wide
        self._found: dict[tuple[nn.Module, str], dict[PruningLayer, _Measured]] = {}
        self._calls: Counter[tuple[nn.Module, str]] = Counter()
        self._alike: dict[tuple[str, Pruning], Decision] = {}  # by shapes: many networks repeat their layers
        self._exact_ms: dict[str, float | None] = {}  # the exact product is the same for all prunings
        self._shapes: dict[nn.Module, str] = {}
        self.largest_work = 0
        self._obstacles: dict[tuple[nn.Module, str], str] = {}  # why a gradient was not measured
        self.amplified: dict[nn.Module, float] = {}
        self.unmeasured = ""
        self.exact: Gradients = {}

    def measure_products(self) -> None:
        """Measures the time and noise of all candidates, in a backward that also computes the exact gradients."""
        with on_gradient(self._twins, lambda module: functools.partial(self._receive, module), weights=True):
            self.exact = self._steps.gradients(self._steps.batches[0])

    def _receive(self, module: nn.Module, grad_output: Tensor, input: Tensor) -> None:
        self._shapes.setdefault(module, str(tuple(grad_output.shape)))
        if input.requires_grad:
            shape = stand_in(input, grad_output)
            self._measure(module, "data", grad_output, shape)
        if module.weight in self._steps.norm.scales and input.device.type != "meta":
            self._measure(module, "weight", grad_output, input.detach())

    def _measure(self, module: nn.Module, gradient: str, grad_output: Tensor, input: Tensor) -> None:
        twins = [twin for twin in self._twins[module] if _fits(twin, gradient, grad_output)]
        if self._narrow_for_wide:
            twins = _widest(twins)
        if not twins:
            self._obstacles[module, gradient] = _too_narrow(self._twins[module], gradient)
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
        some = _some(module, grad_output, twins[0]._rows_multiple)
        part = grad_output[some]
        whole, seen = squared_norm(grad_output), squared_norm(part)
        if seen < whole / 16:  # most of the gradient is in the other samples
            some, part, seen = slice(None), grad_output, whole
        ways = [_products(twin, gradient, part, input[some]) for twin in useful]
        methods = [twin.pruning.method for twin in useful]
        weight: Any = module.weight
        squared = (lambda error: self._steps.norm.squared_of(weight, error)) if gradient == "weight" else None
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
        self.largest_work = max(self.largest_work, products.work)
        pruning = twin.pruning.data if gradient == "data" else twin.pruning.weight
        assert pruning is not None
        if (missing := products.obstacle()) is not None:
            self._obstacles[module, gradient] = f"a sparse product needs {missing}"
            return
        least = max(current_chooser().least_work(products.grad_output.device), LEAST_WORK)
        if products.work < least or pruning.method in slower:
            return
        call = f"{self.names[module]}, call {self._calls[module, gradient]}"
        key = f"{call}: {gradient} {pruning.pattern} {pruning.method}"
        decision = self._steps.memory.decisions.get(key)
        if decision is None:
            shapes = f"{_shapes(module, products.grad_output, input)} {gradient}"
            if (shapes, pruning) not in self._alike:
                self._alike[shapes, pruning] = self._decide(products, pruning, self._exact_ms.get(shapes))
            decision = self._steps.memory.decisions[key] = self._alike[shapes, pruning]
            self._exact_ms[shapes] = decision.exact_ms
        if decision.sparse_ms is None:  # the measurement failed
            self._obstacles[module, gradient] = f"no time was measured: {decision.why}"
            return
        measured.timed = True
        measured.exact_ms += decision.exact_ms or 0.0
        measured.sparse_ms += decision.sparse_ms or 0.0
        if decision.prunes:
            measured.saved_ms += (decision.exact_ms or 0.0) - (decision.sparse_ms or 0.0)
        else:
            slower.add(pruning.method)

    def _decide(self, products: Products, pruning: Pruning, exact_ms: float | None) -> Decision:
        try:
            return current_chooser().measure(products, pruning, self._steps.rounds, exact_ms)
        except RuntimeError as error:  # out of memory, or a library does not support this size
            return Decision("exact", str(error))

    def measure_amplifications(self) -> None:
        """Measures how the noise of data gradients is amplified, on a quarter of the first batch.

        The amplification does not depend on the number of samples. If the model rejects a part of the batch, the whole
        batch is used.
        """
        batch, samples = self._steps.batches[0], samples_of(self._steps.batches[0])
        parts = [] if samples is None else [part_of(batch, 0, max(-(-samples // 4), min(samples, 8)))]
        for part in (*parts, batch):
            try:
                return self._measure_amplifications(part)
            except Exception as error:  # a loss may refuse a part; a reentrant checkpoint refuses the backwards
                self.unmeasured = str(error).partition("\n")[0]

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
            with Handles(layer.register_forward_hook(note_shape, with_kwargs=True) for layer in layers):
                self.amplified = amplifications(layers, self._steps.norm, lambda: self._steps.loss(batch), make_error)

    def candidates(self, batch: Estimate) -> list[Candidate]:
        rows = []
        for (module, gradient), found in self._found.items():
            for twin, measured in found.items():
                if measured.saved_ms <= 0 or measured.errors.exact2 == 0:  # a gradient of zero says nothing
                    noise = math.nan
                elif measured.errors.error2 == 0:
                    noise = 0.0
                elif gradient == "data":
                    noise = self.amplified.get(module, math.nan) * measured.errors.error2
                else:
                    noise = measured.errors.noise
                rows.append(
                    Candidate(
                        self.names[module],
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
        order = {name: index for index, name in enumerate(self.names.values())}
        return sorted(rows, key=lambda row: (order[row.layer], row.gradient))

    def why_not(self, module: nn.Module) -> str:
        """Returns why a layer was not measured."""
        if module not in self._shapes:
            return "no gradient"
        gradients = sorted(
            {key for key in (*self._found, *self._obstacles) if key[0] is module}, key=lambda key: key[1]
        )
        obstacles = [self._obstacles.get(key, TOO_SMALL) for key in gradients]
        return TOO_SMALL if TOO_SMALL in obstacles or not obstacles else obstacles[0]


def _too_narrow(twins: list[PruningLayer], gradient: str) -> str:
    narrowest = min(twins, key=lambda twin: twin.pruning.pattern.m)
    pattern = narrowest.pruning.pattern
    narrow = type(narrowest).too_narrow(narrowest, pattern) if gradient == "data" else None
    return narrow or f"fewer rows or output pixels than m = {pattern.m}"


def _products(twin: PruningLayer, gradient: str, grad_output: Tensor, input: Tensor) -> Products:
    return twin.products(grad_output, input) if gradient == "data" else twin.weight_products(grad_output, input)


def _shapes(module: nn.Module, *tensors: Tensor) -> str:
    """Describes all that the time of a layer's products depends on, except the pruning."""
    geometry = [getattr(module, name, None) for name in ("stride", "padding", "dilation", "groups", "linear_mm_config")]
    geometry += [module.config] if isinstance(module, nn.Linear) and hasattr(module, "config") else []
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


def _some(module: nn.Module, grad_output: Tensor, multiple: int) -> slice:
    """Returns which samples to measure: every fourth one of a large batch, because more would add little.

    All of them, if a fourth of the rows is no multiple of ``multiple``.
    """
    if grad_output.ndim == (3 if isinstance(module, nn.Conv2d) else 1):
        return slice(None)  # without a batch dimension: these are channels or features
    least = 256 if grad_output.ndim == 2 else 4
    every = slice(0, None, 4 if grad_output.shape[0] >= least else 1)
    whole = grad_output[every].numel() // max(grad_output.shape[-1], 1) % multiple == 0
    return every if whole else slice(None)
