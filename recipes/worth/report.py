# SPDX-License-Identifier: BSD-3-Clause
"""Makes the tables and plots of README.md: the loss of each arm in equivalent plain steps, and the net saving in time.

    python -m recipes.worth.report

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
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from sdgp import _plan as plan

from ..common.settings import Settings
from .measure import epoch_steps
from .tasks import TASKS, Task

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
_BEGIN, _END = "<!-- tables: python -m recipes.worth.report -->", "<!-- end of tables -->"

_KINDS = {"steps": "plain, fewer steps", "batch": "plain, smaller batch"}
_METRICS = {"test_loss": "test loss", "bits_per_byte": "bits per byte"}

# The 97.5 % quantiles of Student's t, by degrees of freedom.
_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31}


class Arm(NamedTuple):
    """The runs of one arm.

    Attributes:
        kind: ``"steps"``, ``"batch"``, ``"pruned"`` or ``"budget"``.
        cost: the samples of a plain arm as a share of the samples of the full run; 1 for a pruned arm.
        losses: the test loss by seed.
        row: the name of a pruned arm without its exact steps.
        pruned: the share of the steps that a pruned arm prunes.
        budget: the saving and the noise of the runs with a budget.
    """

    name: str
    kind: str
    cost: float
    losses: dict[int, float]
    row: str = ""
    pruned: float = 1.0
    budget: Saving | None = None


class Saving(NamedTuple):
    """What the runs with a budget saved and the noise that they added: means over their steps, one for each run.

    Attributes:
        cpu: the processor that they ran on.
        asking: the share of the full run that the advice took. It is subtracted from ``saved``.
    """

    cpu: str
    saved: list[float]
    noise: list[float]
    asking: list[float]


class Worth(NamedTuple):
    """The share of plain steps that gives the same loss as a pruned arm, and the ends of its interval."""

    equivalent: float
    low: float
    high: float


def arms(task: Task, lines: list[dict[str, Any]]) -> list[Arm]:
    """Returns the arms that have run, in the order of ``task.arms()``."""
    by_config: dict[Settings, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        by_config[task.config(**line["config"])][line["seed"]] = line
    found = []
    full = task.samples(task.config(**task.base))
    for overrides in task.arms():
        config: Any = task.config(**{**task.base, **overrides})
        if config not in by_config:
            continue
        runs = by_config[config]
        losses = {seed: line.get(task.metric, math.inf) for seed, line in runs.items()}  # inf: diverged
        share = task.samples(config) / full
        if "budget" in overrides:
            exact = config.budget / (config.epochs * epoch_steps(config))
            budget = _budget([line for line in runs.values() if task.metric in line], config)
            name = f"{config.row}, first {exact:.0%} exact"
            found.append(Arm(name, "budget", 1.0, losses, config.row, budget=budget))
        elif "method" in overrides or "plan" in overrides:
            exact = config.exact_first / config.epochs
            name = f"{config.row}, first {exact:.0%} exact" if exact else config.row
            found.append(Arm(name, "pruned", 1.0, losses, config.row, 1 - exact))
        elif "batch_size" in overrides:
            found.append(Arm(f"plain, {share:.1%} of the batch", "batch", share, losses))
        else:
            found.append(Arm(f"plain, {share:.1%} of the steps", "steps", share, losses))
    return found


def _budget(lines: list[dict[str, Any]], config: Any) -> Saving:
    steps = config.epochs * epoch_steps(config)
    result = Saving(lines[0]["machine"]["cpu"] if lines else "", [], [], [])
    for line in lines:
        ends = [said["step"] for said in line["advice"][1:]] + [steps]
        parts = zip(line["advice"], ends, strict=True)
        used = [(said, (end - said["step"]) / steps) for said, end in parts if said["used"]]
        asking = line["asking_steps"] / steps
        result.saved.append(sum(share * said["saved"] for said, share in used) - asking)
        result.noise.append(sum(share * said["noise"] for said, share in used))
        result.asking.append(asking)
    return result


def worth(arm: Arm, plain: list[Arm]) -> Worth:
    """Compares a pruned arm with the plain arms of one kind. The first plain arm is the full run."""
    full = plain[0]
    seeds = sorted(arm.losses.keys() & full.losses.keys())
    if not seeds:
        return Worth(math.nan, math.nan, math.nan)
    differences = [arm.losses[seed] - full.losses[seed] for seed in seeds]
    mean = statistics.mean(differences)
    half = math.inf
    if len(seeds) > 1:
        half = _T.get(len(seeds) - 1, 2.0) * statistics.stdev(differences) / math.sqrt(len(seeds))
    curve = [(_difference(other, full), other.cost) for other in plain if other.losses.keys() & full.losses.keys()]
    ends = (_share(curve, mean + sign * half) for sign in (1, -1))
    return Worth(_share(curve, mean), *ends)


def _difference(arm: Arm, full: Arm) -> float:
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


def table(name: str, task: Task, found: list[Arm], measured: dict[str, dict[str, Any]], noise: dict[str, float]) -> str:
    """Returns a Markdown table with a line per arm. Pruned arms show their worth and net saving on each machine."""
    curves = _curves(found)
    head = [
        "arm",
        _METRICS[task.metric],
        "seeds",
        *(f"= plain run, share of the {kind}" for kind in curves),
        "noise τ",
        "c",
    ]
    lines = [[*head, *(f"step; net, {machine}" for machine in measured)]]
    lines.append(["---"] * len(lines[0]))
    for arm in found:
        values = list(arm.losses.values())
        diverged = values.count(math.inf)
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 and not diverged else ""
        mean = f"diverged in {diverged}" if diverged else f"{statistics.mean(values):.3f}{spread}"
        cells = [arm.name, mean, str(len(values))]
        if arm.kind in ("pruned", "budget") and not diverged:
            worths = [worth(arm, curve) for curve in curves.values()]
            strict = _strict(arm, found)
            tau = statistics.mean(arm.budget.noise) if arm.budget else arm.pruned * noise.get(arm.row, 0.0)
            cells += [f"{value.equivalent:.0%}{_interval(value)}" for value in worths]
            cells += [f"{tau:.3f}", f"{(1 / strict.equivalent - 1) / tau:.1f}"] if tau else ["", ""]
            cells += [_net(_saving(arm, *of_machine), arm, strict) for of_machine in measured.items()]
        lines.append(cells + [""] * (len(lines[0]) - len(cells)))
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"**{name}**\n\n{body}"


def _interval(value: Worth) -> str:
    return "" if math.isnan(value.low) else f" [{value.low:.0%}, {value.high:.0%}]"


def _key(arm: Arm, machine: str) -> str:
    """Returns the arm's name in the measured savings of a machine, or ``""`` if it has none there."""
    if arm.row.startswith("plan "):
        return "plan" if arm.row.endswith(f"-plan-{machine}") else ""
    if not arm.row.startswith("mvue "):
        return ""
    data, _, weight = arm.row.removeprefix("mvue ").partition(", weight gradient ")
    return f"{data} + {weight}" if weight else data


def _saving(arm: Arm, machine: str, document: dict[str, Any]) -> dict[str, Any] | None:
    """Returns what a step of a pruned arm saves on a machine, as measured, or None if that is not known."""
    if arm.budget is None:
        row: dict[str, Any] | None = document["result"].get(_key(arm, machine))
        return row
    if arm.budget.cpu != document["machine"]["cpu"]:
        return None
    saved = arm.budget.saved
    return {"saved": statistics.mean(saved), "saved_low": min(saved), "saved_high": max(saved)}


def _net(row: dict[str, Any] | None, arm: Arm, worth: Worth) -> str:
    """Formats the saving per step, and the net saving in time with the interval that follows from the losses."""
    if row is None:
        return ""
    net, _, interval = _signed(net_saving(arm.pruned * row["saved"], worth)).partition(" ")
    return f"{row['saved']:.0%} [{row['saved_low']:.0%}, {row['saved_high']:.0%}]; **{net}** {interval}".rstrip()


def _signed(value: Worth) -> str:
    """Formats a net saving with its interval, if it has one."""
    interval = "" if math.isnan(value.low) else f" [{value.low:+.0%}, {value.high:+.0%}]"
    return f"{value.equivalent:+.0%}{interval}"


def net_saving(saved: float, worth: Worth) -> Worth:
    """The share of the time to the same loss that is saved, and the ends of its interval."""
    return Worth(*(1 - (1 - saved) / share for share in worth))


def _curves(found: list[Arm]) -> dict[str, list[Arm]]:
    """The plain arms of each kind, the full run first. A kind without another arm is left out."""
    plain = {kind: [arm for arm in found if arm.kind == kind or arm is found[0]] for kind in _KINDS}
    return {kind: curve for kind, curve in plain.items() if len(curve) > 1}


def _strict(arm: Arm, found: list[Arm]) -> Worth:
    """The worth of a pruned arm beside the better of fewer steps and a smaller batch."""
    return min((worth(arm, curve) for curve in _curves(found).values()), key=lambda value: value.equivalent)


def verdicts(name: str, found: list[Arm], measured: dict[str, dict[str, Any]]) -> list[str]:
    """Returns lines of Markdown for each machine: the net saving that ``advise`` predicts, and that of the runs."""
    lines = []
    for machine, document in measured.items():
        predicted = f"{document['saved']:.0%} per step, noise τ {document['noise']:.3f}"
        plans = [arm for arm in found if _key(arm, machine) == "plan"]
        for arm in plans:
            net = plan.net_saving(arm.pruned * document["saved"], arm.pruned * document["noise"], plan.STEPS_PER_NOISE)
            outcome = _signed(net_saving(arm.pruned * document["result"]["plan"]["saved"], _strict(arm, found)))
            exact = f"first {1 - arm.pruned:.0%}" if arm.pruned < 1 else "none"
            lines.append(f"| {name} | {machine} | {predicted} | {exact} | {net:+.0%} | {outcome} |")
        if "plan" not in document["result"]:
            lines.append(f"| {name} | {machine} | nothing pays | | | no plan |")
        elif not plans:
            net = plan.net_saving(document["saved"], document["noise"], plan.STEPS_PER_NOISE)
            lines.append(f"| {name} | {machine} | {predicted} | | {net:+.0%} | not trained with |")
        budgets = [arm for arm in found if arm.budget is not None]
        lines += [
            _verdict_of_budget(name, machine, row, arm, found)
            for arm in budgets
            if (row := _saving(arm, machine, document))
        ]
    return lines


def _verdict_of_budget(name: str, machine: str, row: dict[str, Any], arm: Arm, found: list[Arm]) -> str:
    assert arm.budget is not None
    saved, noise, asking = row["saved"], statistics.mean(arm.budget.noise), statistics.mean(arm.budget.asking)
    said = f"`Budget`: {saved:.0%}, after {asking:.0%} for asking, noise τ {noise:.3f}"
    exact = arm.name.removeprefix(f"{arm.row}, ").removesuffix(" exact")
    net = plan.net_saving(saved, noise, plan.STEPS_PER_NOISE)
    return f"| {name} | {machine} | {said} | {exact} | {net:+.0%} | {_signed(net_saving(saved, _strict(arm, found)))} |"


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


def _label(arm: Arm) -> str:
    """The name of a pruned arm, whatever the machine of its plan."""
    words = "plan" if arm.row.startswith("plan ") else arm.row.replace(", weight gradient ", " + ")
    return words + (f", first {1 - arm.pruned:.0%} exact" if arm.pruned < 1 else "")


def plot(name: str, metric: str, found: list[Arm], measured: dict[str, dict[str, Any]], path: Path) -> None:
    """Plots loss against cost: the curves of the plain arms, and each pruned arm at its cost on each machine."""

    def level(arm: Arm) -> float:  # arms may lack a seed of the full run
        return statistics.mean(found[0].losses.values()) + _difference(arm, found[0])

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for kind, curve in _curves(found).items():
        points = sorted((arm.cost, level(arm)) for arm in curve)
        axes.plot(*zip(*points, strict=True), ".-", label=_KINDS[kind])
    labels = list(dict.fromkeys(_label(arm) for arm in found if arm.kind in ("pruned", "budget")))
    shown, markers = set(), "osD^"
    for machine, marker in zip(measured, markers, strict=False):
        for arm in found:
            row = _saving(arm, machine, measured[machine])
            if row is not None:
                color = f"C{2 + labels.index(_label(arm)) % 8}"
                label = None if _label(arm) in shown else _label(arm)
                axes.plot(1 - arm.pruned * row["saved"], level(arm), marker, color=color, label=label)
                shown.add(_label(arm))
    for machine, marker in zip(measured, markers, strict=False):
        axes.plot([], [], marker, color="black", fillstyle="none", label=machine)
    axes.set(xlabel="cost, as a share of the full plain run", ylabel=metric, title=name)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parts, said = [], []
    for name, task in TASKS.items():
        runs = HERE / "results" / f"{name}.jsonl"
        lines = runs.read_text(encoding="utf-8").splitlines() if runs.exists() else []
        found = arms(task, [json.loads(line) for line in lines])
        measured = {
            path.stem.removeprefix(f"{name}-saved-"): json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(runs.parent.glob(f"{name}-saved-*.json"))
        }
        noise_path = runs.parent / f"{name}-noise.json"
        noise = mean_noise(json.loads(noise_path.read_text(encoding="utf-8"))["result"]) if noise_path.exists() else {}
        noise |= {f"plan {name}-plan-{machine}": document["noise"] for machine, document in measured.items()}
        said += verdicts(name, found, measured)
        if not found:
            continue
        plot(name, _METRICS[task.metric], found, measured, runs.with_suffix(".png"))
        parts.append(f"{table(name, task, found, measured, noise)}\n\n![{name}](results/{name}.png)")
    readme = HERE / "README.md"
    head = (
        "| task | machine | plan | exact steps | predicted net saving | net saving of the runs |\n"
        "|---|---|---|---|---|---|\n"
    )
    text = "\n\n".join([head + "\n".join(said), *parts])
    print(text)
    before, begin, rest = readme.read_text(encoding="utf-8").partition(_BEGIN)
    if not begin:
        sys.exit(f"report: expected {_BEGIN} in {readme}")
    readme.write_text(f"{before}{_BEGIN}\n\n{text}\n\n{_END}{rest.partition(_END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
