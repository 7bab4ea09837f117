# SPDX-License-Identifier: BSD-3-Clause
"""A plan: the choice of what to prune, made from measured candidates, and the verdict whether that pays."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ._models import format_table
from ._pattern import UNBIASED_METHODS

# Note [What noise costs]
# Let τ = noise of pruning / noise of the batch. A run that prunes needs 1 + c τ times the steps for the same loss. The
# noise-scale model predicts c = 1, and the runs of recipes/worth agree with it in both norms. docs/method.md has the
# numbers.
STEPS_PER_NOISE = 1.0

# A smaller net saving is within the measurement error.
_LEAST_NET = 0.01

# The reason for a gradient whose products are not worth a measurement.
TOO_SMALL = "too small to gain"


class Candidate(NamedTuple):
    """One gradient of one layer under one pattern and method: the time that pruning it saves, and the noise it adds.

    Attributes:
        layer: the name of the layer in the model.
        gradient: ``"data"`` or ``"weight"``.
        pattern, method: how this candidate prunes, such as ``"8:16"`` and ``"mvue"``.
        shape: the shape of the output gradient.
        exact_ms, sparse_ms: milliseconds per step of the exact and the sparse product. ``sparse_ms`` is None if the
            sparse product was not measured.
        saved_ms: milliseconds per step that the sparse product saves; 0 unless it is faster by more than the
            measurement noise.
        noise: the noise that pruning adds to the gradient of all parameters, as a share of the noise of the batch.
        error, bias: |p - g| / |g| and |E p - g| / |g| for this gradient g and the pruned gradient p. If nothing is
            saved, ``noise``, ``error`` and ``bias`` are NaN.
    """

    layer: str
    gradient: str
    shape: str
    pattern: str
    method: str
    exact_ms: float
    sparse_ms: float | None
    saved_ms: float
    noise: float
    error: float
    bias: float


class Point(NamedTuple):
    """A point of the greedy choice: the share of a step's time that is saved, the added noise, and the net saving."""

    saved: float
    noise: float
    net: float


class Interval(NamedTuple):
    """A measured value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class Plan(dict[str, tuple[Any, ...]]):
    """The proposal of ``sdgp.advise`` for ``sdgp.convert``: a dictionary from layer names to settings.

    The settings of a layer are ``(pattern, method)`` or ``(pattern, method, weight_grad)``. The pattern ``"1:1"``
    leaves the data gradient exact. Layers that are not in the plan stay plain. A plan can be stored with ``json``. It
    prints as a table with the verdict.

    Attributes:
        pays: whether pruning pays. If it does not, the plan is empty.
        verdict: one sentence that says whether pruning pays, with the numbers.
        saved: the share of a step's time that the plan saves, measured on whole steps.
        limit: the share of a step's time that the exact products of all candidates take. No plan can save more.
        noise: the noise that the chosen products add together, as a share of the noise of the batch.
        net: the share of the time to the same loss that is saved: 1 - (1 - saved) (1 + noise).
        net_low, net_high: the ends of the net saving's 95 % interval. It combines the errors of the noise and of the
            steps' times.
        norm: the norm of the noise, ``"euclidean"`` or ``"adam"``. With ``"adam"``, each coordinate is scaled as the
            optimizer scales its steps.
        chosen, candidates: the chosen and all measured candidates, lists of ``Candidate``.
        curve: the points of the greedy choice, a list of ``Point``.
        notes: hints about other savings, and warnings about the measurement; a list of strings.
        step_ms: milliseconds of a forward and backward of the plain model.

    Examples:
        >>> plan = sdgp.advise(torch.nn.Linear(64, 64), torch.randn(8, 64, requires_grad=True))
        >>> plan.pays, plan
        (False, nothing pays here: every layer is too small at this batch size)
    """

    def __init__(
        self,
        candidates: list[Candidate],
        reasons: Mapping[str, str],
        step_ms: float,
        norm: str = "euclidean",
        noise_error: float = 0.0,
        notes: Iterable[str] = (),
    ) -> None:
        self.candidates, self.step_ms, self.norm, self.notes = candidates, step_ms, norm, list(notes)
        self._reasons, self._noise_error = dict(reasons), noise_error
        self._dropped: list[Candidate] = []  # the choice, if it saves too little
        self._factor = 1.0  # measured noise of all chosen candidates together / sum of their single noises
        self._realized = Interval(1.0, 1.0, 1.0)  # measured saving of the step / sum of the products' savings
        self._choose()

    def _choose(self) -> None:
        self.chosen, self.curve = _greedy(
            self.candidates, self.step_ms, self._realized.value, STEPS_PER_NOISE * self._factor
        )
        self._dropped = []
        if self.curve[-1].net < _LEAST_NET:
            self.chosen, self._dropped = [], self.chosen
        self.clear()
        self.update(_settings(self.chosen))

    def take_realized(self, realized: Interval) -> None:
        """Takes over how much of its products' savings the whole step shows. The choice may change."""
        self._realized = realized
        if not 0.8 < realized.value < 1.25 or self.net < _LEAST_NET:
            self._choose()

    def take_measured(self, noise: float) -> bool:
        """Takes over the measured noise of the whole plan.

        Returns:
            Whether the choice is final. If False, the choice changed and its noise must be measured again.
        """
        total, before = math.fsum(row.noise for row in self.chosen), self.chosen
        if total == 0 < noise:  # the single measurements did not show this noise
            share = noise / len(before)
            self.candidates = [row._replace(noise=share) if row in before else row for row in self.candidates]
            self._choose()
            return False
        close = total > 0 and 0.8 < noise / (self._factor * total) < 1.25
        if total > 0:
            self._factor = noise / total
        if close and self.net >= _LEAST_NET:
            return True
        self._choose()
        return self.chosen == before

    @property
    def pays(self) -> bool:
        return bool(self.chosen)

    @property
    def saved(self) -> float:
        return self._realized.value * self._saved_by_products

    @property
    def _saved_by_products(self) -> float:
        return math.fsum(row.saved_ms for row in self.chosen) / self.step_ms

    @property
    def limit(self) -> float:
        exact: dict[tuple[str, str], float] = {}
        for row in self.candidates:
            if row.sparse_ms is not None:
                key = row.layer, row.gradient
                exact[key] = max(exact.get(key, 0.0), row.exact_ms)
        return math.fsum(exact.values()) / self.step_ms

    @property
    def noise(self) -> float:
        return self._factor * math.fsum(row.noise for row in self.chosen)

    @property
    def net(self) -> float:
        return net_saving(self.saved, self.noise, STEPS_PER_NOISE)

    @property
    def net_low(self) -> float:
        return self.net - self._net_error(self._realized.low, 1 + 2 * self._noise_error)

    @property
    def net_high(self) -> float:
        return self.net + self._net_error(self._realized.high, max(0.0, 1 - 2 * self._noise_error))

    def _net_error(self, realized: float, times: float) -> float:
        """Returns how far the net saving is from the end of its interval.

        The time, then the noise, takes the value at the end of its own interval; the two changes add up as squares.
        """
        by_time = net_saving(realized * self._saved_by_products, self.noise, STEPS_PER_NOISE) - self.net
        by_noise = net_saving(self.saved, times * self.noise, STEPS_PER_NOISE) - self.net
        return math.hypot(by_time, by_noise)

    @property
    def verdict(self) -> str:
        if self.pays:
            steps = STEPS_PER_NOISE * self.noise
            return (
                f"{'it pays' if self.net_low > 0 else 'it may pay'}: {self.net:.0%} less time to the same loss "
                f"[{self.net_low:.0%}, {self.net_high:.0%}]; a step takes {self.saved:.0%} less time, and the added "
                f"noise costs {steps:.0%} more steps"
            )
        if self.curve[-1].net > 0:
            return f"nothing pays here: pruning could save {self.curve[-1].net:.1%} of the time to the same loss"
        faster = [row for row in self.candidates if row.saved_ms > 0]
        if faster and all(math.isnan(row.noise) for row in faster):
            return f"nothing pays here: the noise of all {len(faster)} candidates that save time is unknown"
        faster = [row for row in faster if not math.isnan(row.noise)]
        if faster and self._realized.value <= 0:
            return "nothing pays here: sparse products are faster, but whole steps with them take as long as without"
        if faster:
            cost, per_ms = STEPS_PER_NOISE * self._factor, self._realized.value / self.step_ms
            best = max(faster, key=lambda row: net_saving(per_ms * row.saved_ms, row.noise, cost))
            return (
                f"nothing pays here: the best of {len(faster)} candidates takes {per_ms * best.saved_ms:.1%} "
                f"off a step and costs {cost * best.noise:.1%} more steps ({best.layer or 'the model'}, "
                f"{best.gradient} gradient, {best.pattern})"
            )
        if any(row.sparse_ms is not None for row in self.candidates):
            return "nothing pays here: no sparse product is faster than the exact one"
        reasons = Counter(why for why in self._reasons.values() if why)
        needs = [why for why in reasons if why.startswith("a sparse product needs")]
        if not needs and (TOO_SMALL in reasons or not reasons):
            return "nothing pays here: every layer is too small at this batch size"
        return f"nothing pays here: {needs[0] if needs else reasons.most_common(1)[0][0]}"

    def __str__(self) -> str:
        head = ("layer", "gradient", "shape", "pruned to", "exact ms", "sparse ms", "saved ms", "noise", "bias")
        lines = format_table(head, map(_cells, self.chosen)) if self.chosen else []
        lines += [f"exact ({count}): {why}" for why, count in self._why_exact().items()]
        if self.limit > 0:
            lines.append(f"the products that pruning can shorten take {self.limit:.0%} of a step")
        if self.chosen and self._realized != (1, 1, 1):
            lines.append(
                f"the chosen products save {self._saved_by_products:.0%} of a step; whole steps take {self.saved:.0%} "
                f"[{self._realized.low * self._saved_by_products:.0%}, "
                f"{self._realized.high * self._saved_by_products:.0%}] less time"
            )
        return "\n".join([*lines, *self.notes, self.verdict])

    def __repr__(self) -> str:
        return str(self) if self.chosen else self.verdict

    def _why_exact(self) -> Counter[str]:
        chosen = {(row.layer, row.gradient) for row in self.chosen}
        measured: dict[tuple[str, str], list[Candidate]] = {}
        for row in self.candidates:
            measured.setdefault((row.layer, row.gradient), []).append(row)
        unchosen = {key: rows for key, rows in measured.items() if key not in chosen}
        dropped = {(row.layer, row.gradient) for row in self._dropped}
        counts = Counter(
            "saves too little" if key in dropped else _why(rows, self._realized.value) or self._reasons[key[0]]
            for key, rows in unchosen.items()
        )
        counts.update(
            why for layer, why in self._reasons.items() if why and not any(layer == key[0] for key in measured)
        )
        return counts


def _cells(row: Candidate) -> tuple[str, ...]:
    times = (f"{value or 0:.2f}" for value in (row.exact_ms, row.sparse_ms, row.saved_ms))
    bias = "" if row.method in UNBIASED_METHODS else f"{row.bias:.2f}"
    pruned = f"{row.pattern} {row.method}"
    return (row.layer or "(model)", row.gradient, row.shape, pruned, *times, f"{row.noise:.4f}", bias)


def _why(rows: list[Candidate], realized: float) -> str | None:
    """Returns why a gradient stays exact although it was measured, or None if it was not measured.

    Args:
        realized: how much of its products' savings the whole step shows.
    """
    if all(row.sparse_ms is None for row in rows):
        return None
    faster = [row for row in rows if row.saved_ms > 0]
    if not faster:
        return "sparse is not faster"
    if realized <= 0:
        return "whole steps are not faster"
    return "its noise is unknown" if all(math.isnan(row.noise) for row in faster) else "noise costs more than it saves"


def net_saving(saved: float, noise: float, steps_per_noise: float) -> float:
    """Returns the net saving in time, see Note [What noise costs]."""
    return 1 - (1 - saved) * (1 + steps_per_noise * noise)


def _greedy(
    rows: Iterable[Candidate], step_ms: float, realized: float, cost: float
) -> tuple[list[Candidate], list[Point]]:
    """Adds or replaces one candidate at a time, always the one that gains most, until no candidate gains anything."""
    options: dict[tuple[str, str], list[Candidate]] = {}
    for row in rows:
        if row.saved_ms > 0 and math.isfinite(row.noise):
            options.setdefault((row.layer, row.gradient), []).append(row)
    chosen: dict[tuple[str, str], Candidate] = {}
    saved = noise = 0.0
    curve = [Point(0.0, 0.0, 0.0)]
    while True:
        best: tuple[float, tuple[str, str], Candidate] | None = None
        for key, candidates in options.items():
            old = chosen.get(key)
            for row in candidates:
                more_saved = saved + realized * (row.saved_ms - (old.saved_ms if old else 0.0)) / step_ms
                net = net_saving(more_saved, noise + row.noise - (old.noise if old else 0.0), cost)
                if net > curve[-1].net + 1e-6 and (best is None or net > best[0]):
                    best = net, key, row
        if best is None:
            return [chosen[key] for key in options if key in chosen], curve
        chosen[best[1]] = best[2]
        saved = realized * math.fsum(row.saved_ms for row in chosen.values()) / step_ms
        noise = math.fsum(row.noise for row in chosen.values())
        curve.append(Point(saved, noise, net_saving(saved, noise, cost)))


def _settings(rows: Iterable[Candidate]) -> dict[str, tuple[Any, ...]]:
    """Returns the choice in the form that ``convert`` takes."""
    plan: dict[str, tuple[Any, ...]] = {}
    for row in rows:
        if row.gradient == "data":
            plan[row.layer] = (row.pattern, row.method, *plan.get(row.layer, ())[2:])
        else:
            weight = row.pattern if row.method == "mvue" else (row.pattern, row.method)
            plan[row.layer] = (*plan.get(row.layer, ("1:1", "mvue"))[:2], weight)
    return plan
