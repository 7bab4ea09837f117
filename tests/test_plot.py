# SPDX-License-Identifier: BSD-3-Clause
"""Tests the contents of the pictures of sdgp.plot."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sdgp
from sdgp import _plot
from sdgp._plan import Candidate, Plan

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure
from matplotlib.image import AxesImage


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collects the figure of every saved picture."""
    saved = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **settings: Any) -> None:
        saved.append(figure)
        save(figure, *args, **settings)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


def watched(path: Path) -> sdgp.Watch:
    model = sdgp.convert(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "2:4", "magnitude", backend="pruned")
    watch = sdgp.watch(model, every=1, to=path)
    for number in range(3):
        x = torch.randn(2, 8, requires_grad=True)
        (model if number else model[1:])(x).square().sum().backward()
        if number == 0:
            watch.step += 1  # as if the whole model had been called
    return watch


def test_draws_what_was_watched(tmp_path: Path, figures: list[Figure]) -> None:
    watch = watched(tmp_path / "watch.jsonl")
    assert len(watch["0"]["step"]) == 2
    sdgp.plot(watch, tmp_path / "watch.png", "error")
    sdgp.plot(str(tmp_path / "watch.jsonl"), tmp_path / "lines.png", "error", window=1)
    assert (tmp_path / "watch.png").read_bytes().startswith(b"\x89PNG")
    for figure, window in zip(figures, (10, 1), strict=True):
        heat, bars = figure.axes[:2]
        (image,) = (child for child in heat.get_children() if isinstance(child, AxesImage))
        assert image.get_array().filled(math.nan) == pytest.approx(
            torch.tensor([watch[name]["error"] for name in watch]).numpy(), rel=1e-6
        )
        assert [label.get_text() for label in heat.get_yticklabels()] == ["0", "1"]
        assert [label.get_text() for label in heat.get_xticklabels()] == ["1", "2"]
        assert heat.get_title() == "error: layers by steps"
        widths = [bar.get_width() for bar in bars.patches]
        expected = [sum(watch[name]["error"][-window:]) / min(window, 2) for name in watch]
        assert widths == pytest.approx(expected)
        assert bars.get_title() == f"mean of the last {min(window, 2)} records"


def test_of_a_step_that_was_run_again_the_last_counts(tmp_path: Path) -> None:
    line = (
        '{{"step": {}, "layer": "a", "cosine": {}, "error": null, "bias": 0, "l1_kept": 0, "l2_kept": 0, "zeros": 0, '
    )
    line += '"density": 0}}\n'
    path = tmp_path / "watch.jsonl"
    path.write_text(line.format(3, 0.1) + line.format(1, 0.2) + line.format(3, 0.3))
    record = _plot._read(path)["a"]
    assert (record["step"], record["cosine"]) == ([1, 3], [0.2, 0.3])
    assert math.isnan(record["error"][0])


def test_draws_a_plan(tmp_path: Path, figures: list[Figure]) -> None:
    rows = [
        Candidate("a", "data", "(8, 8)", "2:4", "mvue", 2.0, 1.5, 0.5, 0.01, 0.4, 0.0),
        Candidate("a", "data", "(8, 8)", "1:4", "mvue", 2.0, 1.0, 1.0, 0.09, 0.9, 0.0),
        Candidate("b", "weight", "(8, 8)", "2:4", "mvue", 0.0, None, 0.0, math.nan, math.nan, math.nan),
    ]
    plan = Plan(rows, {}, 10.0)
    sdgp.plot(plan, tmp_path / "plan.png")
    whole, parts = figures[0].axes
    curve, chosen = whole.lines
    assert curve.get_xydata().ravel().tolist() == pytest.approx([0, 0, 1, 5])
    assert chosen.get_xydata().ravel().tolist() == pytest.approx([1, 5])
    points = [line.get_xydata().ravel().tolist() for line in parts.lines]
    assert points == [pytest.approx([1, 5]), pytest.approx([9, 10])]
    assert [text.get_text() for text in parts.get_legend().get_texts()] == ["data 2:4", "data 1:4"]


def test_an_empty_plan(tmp_path: Path, figures: list[Figure]) -> None:
    sdgp.plot(Plan([], {"a": "too small to gain"}, 10.0), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000
    assert figures[0].axes[1].lines[:] == []


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "watch.jsonl"
    for text, message in {
        "": "one record, got none",
        '{"step": 1, "la': "one record, got none",  # half written, since the run may still be writing
        "{}\n": f"sdgp.watch wrote, got {path}:1: {{}}",
        "x\n": f"sdgp.watch wrote, got {path}:1: x",
    }.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=f"^plot: expected .*{re.escape(message)}"):
            sdgp.plot(path, tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"^plot: expected a file that can be read, got .*: No such file"):
        sdgp.plot(tmp_path / "missing", tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"^plot: expected a Watch, the path of its lines, or a Plan, got dict$"):
        sdgp.plot({}, tmp_path / "a.png")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^plot: expected a path that can be written, got .*a\.xyz: .*not supported"):
        sdgp.plot(Plan([], {"a": "too small to gain"}, 10.0), tmp_path / "a.xyz")
    with pytest.raises(ValueError, match=r"^plot: expected metric to be one of cosine, .*, got 'best'$"):
        sdgp.plot(path, tmp_path / "a.png", "best")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'^plot: expected matplotlib, got none: pip install "sdgp\[plot\]"$'):
        sdgp.plot(path, tmp_path / "a.png")
