# SPDX-License-Identifier: BSD-3-Clause
"""Compares the runs of the study: the loss of each arm in equivalent plain steps, and the net saving in time.

A plain run with a share x of the steps, or of the batch size, costs x. A pruned arm costs 1 - p S, where p is the share
of its steps that are pruned, and S is what a pruned step saves on a machine. If its loss equals the loss of a plain run
with the share e, the net saving in time is 1 - (1 - p S) / e. There is one e for fewer steps and one for a smaller
batch; the smaller e counts. A run with sdgp.Budget costs 1 - S: S is the mean over its steps of what the advice said,
less the time of asking. Losses between two plain runs are interpolated, and losses outside are extrapolated
linearly. The 95 % intervals are over the seeds, for the difference to the full plain run with the same seed.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import UserError
from ..common.files import read_lines
from ..common.settings import Settings
from .tasks import Task

_ROOT = Path(__file__).parents[2]

#: The kinds of plain arms, with their names in the plots.
KINDS = {"steps": "plain, fewer steps", "batch": "plain, smaller batch"}

# The 97.5 % quantiles of Student's t, by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}


class Arm(NamedTuple):
    """The runs of one arm.

    Attributes:
        kind: ``"steps"``, ``"batch"`` or ``"pruned"``.
        cost: the samples of a plain arm as a share of the samples of the full run; 1 for a pruned arm.
        losses: the test loss by seed; infinite if the run diverged.
        row: the name of a pruned arm without its exact steps.
        exact: the share of the steps, at the start, that a pruned arm leaves exact.
        budget: the saving and the noise of runs with a budget.
    """

    name: str
    kind: str
    cost: float
    losses: dict[int, float]
    row: str = ""
    exact: float = 0.0
    budget: Saving | None = None

    @property
    def pruned(self) -> float:
        """The share of the run to which the saving of a step applies."""
        return 1.0 if self.budget else 1 - self.exact


class Saving(NamedTuple):
    """What the runs with a budget saved and the noise that they added: means over their steps, one for each run.

    Attributes:
        machine: the machine that they ran on, as ``_machine_of`` names it.
        asking: the share of the full run that the advice took. It is subtracted from ``saved``.
    """

    machine: tuple[Any, ...]
    saved: list[float]
    noise: list[float]
    asking: list[float]


class Worth(NamedTuple):
    """The share of plain steps that gives the same loss as a pruned arm, and the ends of its interval."""

    equivalent: float
    low: float
    high: float


def _t(freedom: int) -> float:
    return _T.get(freedom, 1.96 + 2.7 / freedom)


def arms(task: Task, lines: list[dict[str, Any]]) -> list[Arm]:
    """Returns the arms that have run, in the order of ``task.arms()``."""
    by_config: dict[Settings, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in filter(has_present_plan, lines):
        by_config[task.recipe.config(**line["config"])][line["seed"]] = line
    full = task.config()
    if full not in by_config:
        return []
    found = []
    for overrides in task.arms():
        config: Any = task.config(**overrides)
        if config not in by_config:
            continue
        runs = by_config[config]
        losses = {seed: line.get(task.metric, math.inf) for seed, line in runs.items()}
        share = task.samples(config) / task.samples(full)
        if config.row != "plain":
            exact = config.exact_first / config.epochs
            if config.budget:  # it begins after as many exact steps
                exact = config.budget / (config.epochs * _epoch_steps(config))
            name = f"{config.row}, first {exact:.0%} exact" if exact else config.row
            budget = _budget(config, list(runs.values())) if config.budget else None
            found.append(Arm(name, "pruned", 1.0, losses, config.row, exact, budget))
        elif "batch_size" in overrides:
            found.append(Arm(f"plain, {share:.1%} of the batch", "batch", share, losses))
        else:
            found.append(Arm(f"plain, {share:.1%} of the steps", "steps", share, losses))
    return found


def _epoch_steps(config: Any) -> int:
    steps: int = config.epoch_images // config.batch_size if hasattr(config, "epoch_images") else config.epoch_steps
    return steps


def read_runs(path: Path) -> list[dict[str, Any]]:
    """Reads the result lines of a task, also those of runs that diverged.

    Raises:
        UserError: if the file is not readable or has other lines.
    """
    lines = read_lines(path)
    if not all({"config", "seed"} <= line.keys() for line in lines):
        raise UserError(f"expected result lines of recipes, got other lines in {path}")
    return lines


def has_present_plan(line: dict[str, Any]) -> bool:
    """Returns whether a run had the plan that its file contains now. Lines from before plans were stored count too."""
    path = _ROOT / line["config"].get("plan", "")
    return "plan" not in line or (path.is_file() and line["plan"] == json.loads(path.read_text(encoding="utf-8")))


def _budget(config: Any, lines: list[dict[str, Any]]) -> Saving:
    """Sums up the advice of runs with a budget, on the machine of the first one."""
    steps = config.epochs * _epoch_steps(config)
    ended = [line for line in lines if "advice" in line]
    result = Saving(_machine_of(ended[0]) if ended else (), [], [], [])
    for line in ended:
        if _machine_of(line) != result.machine:
            continue
        ends = [said["step"] for said in line["advice"][1:]] + [steps]
        parts = zip(line["advice"], ends, strict=True)
        used = [(said, (end - said["step"]) / steps) for said, end in parts if said["used"]]
        asking = line["asking_steps"] / steps
        result.saved.append(sum(share * said["saved"] for said, share in used) - asking)
        result.noise.append(sum(share * said["noise"] for said, share in used))
        result.asking.append(asking)
    return result


def _machine_of(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line["machine"][key] for key in ("cpu", "isa", "threads"))


def comparable_arms(found: list[Arm]) -> list[Arm]:
    """Returns the arms without a diverged run that share a seed with the full run, which comes first."""

    def is_comparable(arm: Arm) -> bool:
        return all(map(math.isfinite, arm.losses.values())) and bool(arm.losses.keys() & found[0].losses.keys())

    return list(filter(is_comparable, found)) if found and is_comparable(found[0]) else []


def plain_curves(comparable: list[Arm]) -> dict[str, list[Arm]]:
    """The plain arms of each kind, the full run first. A kind without another arm is left out."""
    plain = {kind: [arm for arm in comparable if arm.kind == kind or arm is comparable[0]] for kind in KINDS}
    return {kind: curve for kind, curve in plain.items() if len(curve) > 1}


def strict_worth(arm: Arm, comparable: list[Arm]) -> Worth:
    """The worth of a pruned arm beside the better of fewer steps and a smaller batch."""
    worths = [worth(arm, curve) for curve in plain_curves(comparable).values()]
    return min(worths, key=lambda value: value.equivalent, default=Worth(math.nan, math.nan, math.nan))


def worth(arm: Arm, plain: list[Arm]) -> Worth:
    """Compares a pruned arm with the plain arms of one kind. The first plain arm is the full run."""
    full = plain[0]
    seeds = sorted(arm.losses.keys() & full.losses.keys())
    differences = [arm.losses[seed] - full.losses[seed] for seed in seeds]
    mean = statistics.mean(differences)
    half = math.inf
    if len(seeds) > 1:
        half = _t(len(seeds) - 1) * statistics.stdev(differences) / math.sqrt(len(seeds))
    curve = [(difference(other, full), other.cost) for other in plain]
    ends = (_share(curve, mean + sign * half) for sign in (1, -1))
    return Worth(_share(curve, mean), *ends)


def difference(arm: Arm, full: Arm) -> float:
    seeds = arm.losses.keys() & full.losses.keys()
    return statistics.mean(arm.losses[seed] - full.losses[seed] for seed in seeds)


def _share(curve: list[tuple[float, float]], difference: float) -> float:
    """Returns the share of the plain run that has this difference in loss to the full run."""
    if not math.isfinite(difference):
        return math.nan
    points = sorted(curve)
    for (low, cost_low), (high, cost_high) in itertools.pairwise(points):
        if difference <= high or (high, cost_high) == points[-1]:
            return cost_low + (difference - low) / (high - low) * (cost_high - cost_low)
    return math.nan


def key_of(arm: Arm, machine: str) -> str:
    """Returns the arm's name in the measured savings of a machine, or ``""`` if it has none there."""
    if arm.row.startswith("plan "):
        return "plan" if arm.row.endswith(f"-plan-{machine}") else ""
    if not arm.row.startswith("mvue "):
        return ""
    data, _, weight = arm.row.removeprefix("mvue ").partition(", weight gradient ")
    return f"{data} + {weight}" if weight else data


def saving_of(arm: Arm, machine: str, document: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what a step of a pruned arm saves on a machine, as measured, or None if that is not known."""
    if arm.budget is None:
        row: dict[str, Any] | None = document["result"].get(key_of(arm, machine))
        return row
    if not arm.budget.saved or arm.budget.machine != _machine_of(document):
        return None
    saved = arm.budget.saved
    return {"saved": statistics.mean(saved), "saved_low": min(saved), "saved_high": max(saved)}


def net_saving(saved: float, worth: Worth) -> Worth:
    """The share of the time to the same loss that is saved, and the ends of its interval.

    No plain run, however short, has the loss of an arm whose share is negative: then nothing is saved at all.
    """
    return Worth(*(-math.inf if share <= 0 else 1 - (1 - saved) / share for share in worth))


def mean_noise(points: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the mean noise of each arm by name, without the first quarter of the run."""
    result = {}
    later = points[max(1, len(points) // 4) :]
    patterns = {key.split()[1] for key in later[0]["noise"]} if later else set()
    means = {
        key: statistics.mean(point["noise"][key] for point in later) for key in (later[0]["noise"] if later else ())
    }
    for data in patterns:
        result[f"mvue {data}"] = means[f"data {data}"]
        for weight in patterns:
            result[f"mvue {data}, weight gradient {weight}"] = means[f"data {data}"] + means[f"weight {weight}"]
    return result
