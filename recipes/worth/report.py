# SPDX-License-Identifier: BSD-3-Clause
"""Makes the tables and plots of README.md: ``python -m recipes.worth.report``. compare.py says what they mean."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

from sdgp import _plan as plan

from ..common.errors import UserError
from ..common.files import replace_between
from .compare import (
    KINDS,
    Arm,
    Worth,
    arms,
    comparable_arms,
    difference,
    key_of,
    mean_noise,
    net_saving,
    plain_curves,
    read_runs,
    saving_of,
    strict_worth,
    worth,
)
from .tasks import TASKS, Task

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
_BEGIN, _END = "<!-- tables: python -m recipes.worth.report -->", "<!-- end of tables -->"

_METRICS = {"test_loss": "test loss", "bits_per_byte": "bits per byte"}


def table(name: str, task: Task, found: list[Arm], measured: dict[str, dict[str, Any]], noise: dict[str, float]) -> str:
    """Returns a Markdown table with a line per arm. Pruned arms show their worth and net saving on each machine."""
    comparable = comparable_arms(found)
    curves = plain_curves(comparable)
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
            strict = strict_worth(arm, comparable)
            tau = statistics.mean(arm.budget.noise) if arm.budget else arm.pruned * noise.get(arm.row, 0.0)
            cells += [f"{value.equivalent:.0%}{_interval(value)}" for value in worths]
            cells += [f"{tau:.3f}", f"{(1 / strict.equivalent - 1) / tau:.1f}"] if tau else ["", ""]
            cells += [_net(saving_of(arm, *of_machine), arm, strict) for of_machine in measured.items()]
        lines.append(cells + [""] * (len(lines[0]) - len(cells)))
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"**{name}**\n\n{body}"


def _interval(value: Worth) -> str:
    return "" if math.isnan(value.low) else f" [{value.low:.0%}, {value.high:.0%}]"


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


def verdicts(name: str, found: list[Arm], measured: dict[str, dict[str, Any]]) -> list[str]:
    """Returns lines of Markdown for each machine: the net saving that ``advise`` predicts, and that of the runs."""
    comparable, lines = comparable_arms(found), []
    for machine, document in measured.items():
        limit = f" of at most {document['limit']:.0%}" if "limit" in document else ""
        proposed = f"{document['saved']:.0%}{limit} per step, noise τ {document['noise']:.3f}"
        with_plan = False
        for arm in comparable:
            row = saving_of(arm, machine, document)
            if row is None or not (arm.budget or key_of(arm, machine) == "plan"):
                continue
            if arm.budget:
                saved, noise = row["saved"], statistics.mean(arm.budget.noise)
                asking = statistics.mean(arm.budget.asking)
                said = f"`Budget`: {saved:.0%}, after {asking:.0%} for asking, noise τ {noise:.3f}"
            else:
                saved, noise, said, with_plan = document["saved"], document["noise"], proposed, True
            net = plan.net_saving(arm.pruned * saved, arm.pruned * noise, plan.STEPS_PER_NOISE)
            outcome = _signed(net_saving(arm.pruned * row["saved"], strict_worth(arm, comparable)))
            exact = f"first {arm.exact:.0%}" if arm.exact else "none"
            lines.append(f"| {name} | {machine} | {said} | {exact} | {net:+.0%} | {outcome} |")
        if "plan" not in document["result"]:
            lines.append(f"| {name} | {machine} | nothing pays | | | no plan |")
        elif not with_plan:
            net = plan.net_saving(document["saved"], document["noise"], plan.STEPS_PER_NOISE)
            lines.append(f"| {name} | {machine} | {proposed} | | {net:+.0%} | not trained with |")
    return lines


def _label(arm: Arm) -> str:
    """The name of a pruned arm, whatever the machine of its plan."""
    words = "plan" if arm.row.startswith("plan ") else arm.row.replace(", weight gradient ", " + ")
    return words + (f", first {arm.exact:.0%} exact" if arm.exact else "")


def plot(name: str, metric: str, found: list[Arm], measured: dict[str, dict[str, Any]], path: Path) -> None:
    """Plots loss against cost: the curves of the plain arms, and each pruned arm at its cost on each machine."""

    found = comparable_arms(found)

    def level(arm: Arm) -> float:  # arms may lack a seed of the full run
        return statistics.mean(found[0].losses.values()) + difference(arm, found[0])

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for kind, curve in plain_curves(found).items():
        points = sorted((arm.cost, level(arm)) for arm in curve)
        axes.plot(*zip(*points, strict=True), ".-", label=KINDS[kind])
    labels = list(dict.fromkeys(_label(arm) for arm in found if arm.kind == "pruned"))
    shown, markers = set(), "osD^"
    for machine, marker in zip(measured, markers, strict=False):
        for arm in found:
            row = saving_of(arm, machine, measured[machine])
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
        found = arms(task, read_runs(runs) if runs.exists() else [])
        measured = {
            path.stem.removeprefix(f"{name}-saved-"): json.loads(path.read_text(encoding="utf-8"))
            for path in sorted(runs.parent.glob(f"{name}-saved-*.json"))
        }
        noise_path = runs.parent / f"{name}-noise.json"
        noise = mean_noise(json.loads(noise_path.read_text(encoding="utf-8"))["result"]) if noise_path.exists() else {}
        noise |= {f"plan {name}-plan-{machine}": document["noise"] for machine, document in measured.items()}
        said += verdicts(name, found, measured)
        if not comparable_arms(found):
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
    try:
        main()
    except UserError as error:
        sys.exit(f"report: {error}")
