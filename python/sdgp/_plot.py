# SPDX-License-Identifier: BSD-3-Clause
"""Draws the records of a ``Watch`` and the candidates of a ``Plan``. matplotlib is imported only for drawing."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ._fidelity import METRICS
from ._plan import STEPS_PER_NOISE, Plan
from ._watch import Record, Watch, recent

# The height of one line of text, in inches.
_LINE = 0.25


def plot(
    source: Watch | str | PathLike[str] | Plan, path: str | PathLike[str], metric: str = "cosine", *, window: int = 10
) -> None:
    """Draws the records of ``sdgp.watch`` or the result of ``sdgp.advise``, and saves the picture.

    For a ``Watch`` or the JSON lines that it wrote, the picture shows a heat map of ``metric``, layers by steps, and
    the mean over the last ``window`` records of each layer. For a ``Plan``, it shows the time that a step saves against
    the extra steps that the added noise costs: once for the plan as it was built up, once for every single candidate.

    Args:
        source: a ``Watch``, the path of its JSON lines, or a ``Plan``.
        path: the path of the picture. The suffix sets the format.
        metric: a metric of ``sdgp.watch``. A ``Plan`` ignores it.
        window: the number of records in the mean. A ``Plan`` ignores it.

    Raises:
        ValueError: If an argument is invalid. The message reads ``plot: requirement, got actual``.
        ImportError: if matplotlib is not installed.

    Examples:
        >>> model = sdgp.convert(torch.nn.Linear(64, 64), "2:4", backend="pruned")
        >>> watch = sdgp.watch(model, every=1)
        >>> model(torch.randn(8, 64, requires_grad=True)).square().sum().backward()
        >>> sdgp.plot(watch, "watch.png")
    """
    if metric not in METRICS:
        raise ValueError(f"plot: expected metric to be one of {', '.join(METRICS)}, got {metric!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plot: expected matplotlib, got none: pip install "sdgp[plot]"') from error
    figure = Figure(layout="constrained")
    if isinstance(source, Plan):
        _draw_plan(figure, source)
    else:
        records = source if isinstance(source, Watch) else _read(source)
        if not records:
            raise ValueError("plot: expected at least one record, got none: did a layer prune?")
        _draw_records(figure, records, metric, window)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: matplotlib does not know the suffix
        raise ValueError(f"plot: expected a path that can be written, got {path}: {error}") from error


def _read(path: str | PathLike[str]) -> dict[str, Record]:
    """Reads the JSON lines that a ``Watch`` wrote. If a resumed run repeated a step, the last line counts."""
    steps: dict[str, dict[int, dict[str, float]]] = {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"plot: expected a file that can be read, got {path}: {error.strerror}") from error
    except TypeError:
        got = type(path).__name__
        raise ValueError(f"plot: expected a Watch, the path of its lines, or a Plan, got {got}") from None
    complete = text[: text.rfind("\n") + 1]  # the last line may be incomplete
    for number, line in enumerate(complete.splitlines(), 1):
        try:
            row = json.loads(line)
            values = {key: math.nan if row[key] is None else float(row[key]) for key in METRICS}
            steps.setdefault(row["layer"], {})[int(row["step"])] = values
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"plot: expected lines that sdgp.watch wrote, got {path}:{number}: {line[:80]}") from error
    records: dict[str, Record] = {}
    for layer, rows in steps.items():
        order = sorted(rows)
        records[layer] = {
            "step": [float(step) for step in order],
            **{key: [rows[step][key] for step in order] for key in METRICS},
        }
    return records


def _draw_records(figure: Any, records: Mapping[str, Record], metric: str, window: int) -> None:
    layers = list(records)
    steps = sorted({step for record in records.values() for step in record["step"]})
    column = {step: index for index, step in enumerate(steps)}
    grid = [[math.nan] * len(steps) for _ in layers]
    for line, record in zip(grid, records.values(), strict=True):
        for step, value in zip(record["step"], record[metric], strict=True):
            line[column[step]] = value
    figure.set_size_inches(12, 2 + _LINE * len(layers))
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    image = heat.imshow(grid, aspect="auto", interpolation="nearest", vmin=0, cmap="viridis")
    image.set_clim(0, max(1.0, image.get_clim()[1]))
    shown = range(0, len(steps), -(-len(steps) // 8))
    heat.set_xticks(shown, [f"{steps[index]:g}" for index in shown])
    heat.set_yticks(range(len(layers)), layers, fontsize=8)
    heat.set(title=f"{metric}: layers by steps", xlabel="step")
    figure.colorbar(image, ax=heat, pad=0.01)
    means = [recent(record[metric], window) for record in records.values()]
    bars.barh(range(len(layers)), means, 0.7)
    bars.set(title=f"mean of the last {min(window, len(steps))} records", xlabel=metric)
    bars.tick_params(axis="y", labelleft=False)
    bars.grid(axis="x", alpha=0.3)


def _draw_plan(figure: Any, plan: Plan) -> None:
    figure.set_size_inches(12, 5.5)
    whole, parts = figure.subplots(1, 2)
    cost = STEPS_PER_NOISE
    points = [(100 * cost * point.noise, 100 * point.saved) for point in plan.curve]
    whole.plot(*zip(*points, strict=True), ".-", label="one gradient after the other")
    whole.plot([100 * cost * plan.noise], [100 * plan.saved], "o", markersize=9, label=f"the plan, {plan.net:.0%} net")
    right = 1.25 * max(whole.get_xlim()[1], whole.get_ylim()[1])
    steps = [right * index / 50 for index in range(51)]
    even = [100 - 100 / (1 + more / 100) for more in steps]
    whole.fill_between(steps, even, color="tab:red", alpha=0.12, linewidth=0, label="does not pay")
    whole.set_xlim(0, right)
    whole.set_ylim(0, right)
    title = f"the plan's choice; a step of {plan.step_ms:.1f} ms"
    whole.set(title=title, xlabel="more steps for the same loss, %", ylabel="less time per step, %")
    faster = [row for row in plan.candidates if row.saved_ms > 0 and row.noise > 0]
    for (gradient, pattern), marker in zip(
        dict.fromkeys((row.gradient, row.pattern) for row in faster), itertools.cycle("osD^vP"), strict=False
    ):
        rows = [row for row in faster if (row.gradient, row.pattern) == (gradient, pattern)]
        xs, ys = [100 * cost * row.noise for row in rows], [100 * row.saved_ms / plan.step_ms for row in rows]
        parts.plot(xs, ys, marker, label=f"{gradient} {pattern}", alpha=0.7)
    if faster:
        parts.set_xscale("log")
    parts.set(title="each gradient by itself", xlabel="more steps, %", ylabel="less time per step, %")
    for axes in (whole, parts):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=9)
