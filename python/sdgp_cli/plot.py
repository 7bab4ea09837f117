# SPDX-License-Identifier: BSD-3-Clause
"""Draws the picture of ``sdgp bench``. Only this module imports matplotlib, and only when it draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from . import Report
from .measurements import METHOD, Row


def draw(report: Report, title: str, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(18, 6), layout="constrained")
    pruning, products, steps = figure.subplots(1, 3)
    _draw_pruning(pruning, report["prune_nm"])
    _draw_products(products, report["data_gradient"])
    _draw_steps(steps, report["train_step"])
    figure.suptitle(title)
    figure.savefig(path, dpi=100)


def _draw_pruning(axes: Any, rows: list[Row]) -> None:
    labels = [f"{row['tensor']}, {row['pattern']}" for row in rows]
    for method in rows[0]["times_clone"]:
        axes.plot([row["times_clone"][method] for row in rows], labels, "o", label=method)
    _finish(axes, 1, title="prune_nm", xlabel="time, in clone()s of the same tensor (1: as long as a copy)")
    axes.set_xlim(0, None)


def _draw_products(axes: Any, rows: list[Row]) -> None:
    for pattern in dict.fromkeys(row["pattern"] for row in rows):
        of_pattern = [row for row in rows if row["pattern"] == pattern]
        speed = [float("nan") if row["obstacle"] else row["times_exact"] for row in of_pattern]
        axes.plot(speed, [row["layer"] for row in of_pattern], "o", label=pattern)
    _finish(
        axes, 1, title=f"data gradient, sparse product, {METHOD}", xlabel="times as fast as exact, pruning included"
    )
    axes.set_xlim(0, None)


def _draw_steps(axes: Any, rows: list[Row]) -> None:
    labels = [f"{row['model']}\n{row['pattern']}" for row in rows]
    axes.barh(labels, [100 * row["saved"] for row in rows], 0.5, label="auto")
    axes.plot(
        [100 * row["plain_again_saved"] for row in rows], labels, "kD", markersize=5, label="a second plain model"
    )
    _finish(axes, 0, title=f"training step, {METHOD}, backend auto", xlabel="% of the plain step's time saved")


def _finish(axes: Any, no_difference: float, **texts: str) -> None:
    axes.axvline(no_difference, color="grey", linewidth=0.8)
    axes.set(**texts)
    axes.invert_yaxis()  # the same order as in the text
    axes.margins(y=0.15)
    axes.tick_params(axis="y", labelsize=9)
    axes.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=5, columnspacing=1, handletextpad=0.3)
