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
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from sdgp import _plan as plan

from ..common.files import replace_between
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


def _t(freedom: int) -> float:
    return _T.get(freedom, 1.96 + 2.7 / freedom)


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


def arms(task: Task, lines: list[dict[str, Any]]) -> list[Arm]:
    """Returns the arms that have run, in the order of ``task.arms()``."""
    by_config: dict[Settings, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in lines:
        by_config[task.config(**line["config"])][line["seed"]] = line
    full = task.config(**task.base)
    if full not in by_config:
        return []
    found = []
    for overrides in task.arms():
        config: Any = task.config(**{**task.base, **overrides})
        if config not in by_config:
            continue
        runs = by_config[config]
        losses = {seed: line.get(task.metric, math.inf) for seed, line in runs.items()}
        share = task.samples(config) / task.samples(full)
        if config.row != "plain":
            exact = (config.exact_first + config.budget / epoch_steps(config)) / config.epochs
            name = f"{config.row}, first {exact:.0%} exact" if exact else config.row
            budget = _budget(config, list(runs.values())) if config.budget else None
            found.append(Arm(name, "pruned", 1.0, losses, config.row, exact, budget))
        elif "batch_size" in overrides:
            found.append(Arm(f"plain, {share:.1%} of the batch", "batch", share, losses))
        else:
            found.append(Arm(f"plain, {share:.1%} of the steps", "steps", share, losses))
    return found


def _budget(config: Any, lines: list[dict[str, Any]]) -> Saving:
    """Sums up the advice of runs with a budget, on the machine of the first one."""
    steps = config.epochs * epoch_steps(config)
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


def worth(arm: Arm, plain: list[Arm]) -> Worth:
    """Compares a pruned arm with the plain arms of one kind. The first plain arm is the full run."""
    full = plain[0]
    seeds = sorted(arm.losses.keys() & full.losses.keys())
    differences = [arm.losses[seed] - full.losses[seed] for seed in seeds]
    mean = statistics.mean(differences)
    half = math.inf
    if len(seeds) > 1:
        half = _t(len(seeds) - 1) * statistics.stdev(differences) / math.sqrt(len(seeds))
    curve = [(_difference(other, full), other.cost) for other in plain]
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
    comparable = _comparable(found)
    curves = _curves(comparable)
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
        if arm.kind == "pruned" and arm in comparable:
            worths = [worth(arm, curve) for curve in curves.values()]
            strict = _strict(arm, comparable)
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
    if not arm.budget.saved or arm.budget.machine != _machine_of(document):
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
    if math.isnan(value.equivalent):
        return "unknown"
    shown = [f"{share:+.0%}" if share > -1 else "< -100%" for share in value]
    return shown[0] if math.isnan(value.low) else f"{shown[0]} [{shown[1]}, {shown[2]}]"


def net_saving(saved: float, worth: Worth) -> Worth:
    """The share of the time to the same loss that is saved, and the ends of its interval.

    No plain run, however short, has the loss of an arm whose share is negative: then nothing is saved at all.
    """
    return Worth(*(-math.inf if share <= 0 else 1 - (1 - saved) / share for share in worth))


def _comparable(found: list[Arm]) -> list[Arm]:
    """Returns the arms without a diverged run that share a seed with the full run, which comes first."""

    def is_comparable(arm: Arm) -> bool:
        return all(map(math.isfinite, arm.losses.values())) and bool(arm.losses.keys() & found[0].losses.keys())

    return list(filter(is_comparable, found)) if found and is_comparable(found[0]) else []


def _curves(comparable: list[Arm]) -> dict[str, list[Arm]]:
    """The plain arms of each kind, the full run first. A kind without another arm is left out."""
    plain = {kind: [arm for arm in comparable if arm.kind == kind or arm is comparable[0]] for kind in _KINDS}
    return {kind: curve for kind, curve in plain.items() if len(curve) > 1}


def _strict(arm: Arm, comparable: list[Arm]) -> Worth:
    """The worth of a pruned arm beside the better of fewer steps and a smaller batch."""
    worths = [worth(arm, curve) for curve in _curves(comparable).values()]
    return min(worths, key=lambda value: value.equivalent, default=Worth(math.nan, math.nan, math.nan))


def verdicts(name: str, found: list[Arm], measured: dict[str, dict[str, Any]]) -> list[str]:
    """Returns lines of Markdown for each machine: the net saving that ``advise`` predicts, and that of the runs."""
    comparable, lines = _comparable(found), []
    for machine, document in measured.items():
        proposed = f"{document['saved']:.0%} per step, noise τ {document['noise']:.3f}"
        with_plan = False
        for arm in comparable:
            row = _saving(arm, machine, document)
            if row is None or not (arm.budget or _key(arm, machine) == "plan"):
                continue
            if arm.budget:
                saved, noise = row["saved"], statistics.mean(arm.budget.noise)
                asking = statistics.mean(arm.budget.asking)
                said = f"`Budget`: {saved:.0%}, after {asking:.0%} for asking, noise τ {noise:.3f}"
            else:
                saved, noise, said, with_plan = document["saved"], document["noise"], proposed, True
            net = plan.net_saving(arm.pruned * saved, arm.pruned * noise, plan.STEPS_PER_NOISE)
            outcome = _signed(net_saving(arm.pruned * row["saved"], _strict(arm, comparable)))
            exact = f"first {arm.exact:.0%}" if arm.exact else "none"
            lines.append(f"| {name} | {machine} | {said} | {exact} | {net:+.0%} | {outcome} |")
        if "plan" not in document["result"]:
            lines.append(f"| {name} | {machine} | nothing pays | | | no plan |")
        elif not with_plan:
            net = plan.net_saving(document["saved"], document["noise"], plan.STEPS_PER_NOISE)
            lines.append(f"| {name} | {machine} | {proposed} | | {net:+.0%} | not trained with |")
    return lines


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
    return words + (f", first {arm.exact:.0%} exact" if arm.exact else "")


def plot(name: str, metric: str, found: list[Arm], measured: dict[str, dict[str, Any]], path: Path) -> None:
    """Plots loss against cost: the curves of the plain arms, and each pruned arm at its cost on each machine."""

    found = _comparable(found)

    def level(arm: Arm) -> float:  # arms may lack a seed of the full run
        return statistics.mean(found[0].losses.values()) + _difference(arm, found[0])

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for kind, curve in _curves(found).items():
        points = sorted((arm.cost, level(arm)) for arm in curve)
        axes.plot(*zip(*points, strict=True), ".-", label=_KINDS[kind])
    labels = list(dict.fromkeys(_label(arm) for arm in found if arm.kind == "pruned"))
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
        if not _comparable(found):
            continue
        plot(name, _METRICS[task.metric], found, measured, runs.with_suffix(".png"))
        parts.append(f"{table(name, task, found, measured, noise)}\n\n![{name}](results/{name}.png)")
    head = (
        "| task | machine | plan | exact steps | predicted net saving | net saving of the runs |\n"
        "|---|---|---|---|---|---|\n"
    )
    text = "\n\n".join([head + "\n".join(said), *parts])
    print(text)
    replace_between(HERE / "README.md", _BEGIN, _END, text)


if __name__ == "__main__":
    main()
