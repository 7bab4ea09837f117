# SPDX-License-Identifier: BSD-3-Clause
"""Pictures of what was watched and of what was advised. matplotlib is imported when one is drawn."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from ._advise import Plan
from ._fidelity import METRICS
from ._watch import Record, Watch, recent

# One unit is some 0.25 inch: a line of text.
_LINE = 0.25


def plot(
    source: Watch | str | PathLike[str] | Plan, path: str | PathLike[str], metric: str = "cosine", *, window: int = 10
) -> None:
    """Draws what ``sdgp.watch`` recorded, or what ``sdgp.advise`` found, as a picture.

    Of a ``Watch``, or of the JSON lines it wrote: a heat map of ``metric``, layers by steps, and beside it the mean
    over the last ``window`` records of each layer. Of a ``Plan``: the time saved against the error of the
    parameters' gradient for some values of ``max_error``, the proposal marked; and every candidate of each layer.

    Args:
        source: a ``Watch``, the path of its JSON lines, or a ``Plan``.
        path: of the picture; its suffix says the format.
        metric: one of those that ``sdgp.watch`` lists.
        window: of records, for the bars.

    Raises:
        ValueError: ``plot: requirement, got actual``.
        ImportError: where matplotlib is missing.

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
    except OSError as error:
        raise ValueError(f"plot: expected a path that can be written, got {path}: {error.strerror}") from error


def _read(path: str | PathLike[str]) -> dict[str, Record]:
    """The JSON lines that a ``Watch`` wrote; of a step that was run again after a resume, the last."""
    steps: dict[str, dict[int, dict[str, float]]] = {}
    text = Path(path).read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]  # the last line may be half written
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
    figure.set_size_inches(12, 6)
    whole, layers = figure.subplots(1, 2)
    whole.plot([point.error for point in plan.curve], [point.saved_ms for point in plan.curve], ".-", label="max_error")
    for point in plan.curve:
        offset = {"xytext": (4, -10), "textcoords": "offset points"}
        whole.annotate(f"{point.max_error:.2f}", (point.error, point.saved_ms), fontsize=8, **offset)
    whole.plot([plan.error], [plan.saved_ms], "o", markersize=9, label=f"proposed: max_error={plan.max_error:g}")
    title = f"a training step of {plan.step_ms:.1f} ms"
    whole.set_xscale("symlog", linthresh=1)
    whole.set_xlim(0, None)
    whole.set(title=title, xlabel="error of the parameters' gradient", ylabel="ms saved")
    measured = [row for row in plan.candidates if row.sparse_ms is not None]
    for setting in dict.fromkeys((row.pattern, row.method) for row in measured):
        rows = [row for row in measured if (row.pattern, row.method) == setting]
        layers.plot(
            [row.error for row in rows], [row.saved_ms for row in rows], "o", label=" ".join(setting), alpha=0.7
        )
    layers.axvline(plan.max_error, color="grey", linewidth=0.8)
    layers.set(title="each layer by itself", xlabel="error of its data gradient", ylabel="ms saved")
    for axes in (whole, layers):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=9)
