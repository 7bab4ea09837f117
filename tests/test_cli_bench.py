# SPDX-License-Identifier: BSD-3-Clause
"""Tests `sdgp bench` at sizes that take milliseconds: its report, its files, and how it measures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from command_line import Command, report

from sdgp import _timing
from sdgp._autograd import Conv2dProducts, LinearProducts
from sdgp_cli import measurements

TINY = measurements.Sizes(64, ((64, 64, 128),), ((3, 2, 32, 32, 8),), (2, 8), (2, 4, 64))


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(measurements.SIZES, "cpu", TINY)
    for subject in measurements.SECONDS:
        monkeypatch.setitem(measurements.SECONDS, subject, 0.0)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("options", [("--quick",), ()], ids=["quick", "full"])
def test_bench(options: tuple[str, ...], command: Command) -> None:
    found = report(command, "bench", "--threads", "1", "--device", "cpu", "--out", "results", *options)
    patterns = ["2:4", "4:32"] if options else ["2:4", "1:4", "4:32"]
    assert found["quick"] == bool(options)
    assert found["machine"]["threads"] == 1
    assert [row["pattern"] for row in found["prune_nm"]] == 2 * patterns
    for row in found["prune_nm"]:
        assert 0 < row["clone_ms"] < 1000
        assert set(row["times_clone"]) == {"magnitude", "random", "rescale", "rescale_group", "mvue", "unstructured"}
        assert all(0.01 < times < 1000 for times in row["times_clone"].values())
    assert [row["pattern"] for row in found["data_gradient"]] == 2 * patterns
    for row in found["data_gradient"]:
        assert row["obstacle"] is None
        assert row["times_exact"] == pytest.approx(row["exact_ms"] / row["sparse_ms"], rel=0.1)
    convolutions = [4 if pattern == "4:32" else 5 for pattern in patterns]  # the last layer has only 10 outputs
    assert [row["layers"] for row in found["train_step"]] == convolutions + [5] * len(patterns)
    for row in found["train_step"]:
        assert row["saved_low"] <= row["saved"] <= row["saved_high"] < 1
    text = Path("results/sdgp-bench.txt").read_text()
    assert "linear 64 -> 128, 64 tokens" in text
    assert json.loads(Path("results/sdgp-bench.json").read_text())["prune_nm"] == found["prune_nm"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("out", "start"), [("a/b.png", b"\x89PNG"), ("b.svg", b"<?xml"), ("results.v2", b"\x89PNG")])
def test_bench_draws(out: str, start: bytes, command: Command) -> None:
    pytest.importorskip("matplotlib")
    status, text, progress = command("bench", "--quick", "--device", "cpu", "--out", out)
    assert status == 0
    picture = Path(out) / "sdgp-bench.png" if out == "results.v2" else Path(out)
    assert picture.read_bytes().startswith(start)
    assert f"\nWritten: {picture}" in text
    assert [line.split()[0] for line in progress.splitlines()] == [f"[{step}/10]" for step in range(1, 11)]


@pytest.mark.usefixtures("tiny")
def test_bench_without_matplotlib(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    status, text, _ = command("bench", "--quick", "--device", "cpu")
    assert status == 0
    assert text.endswith("\nNo plot: it needs matplotlib (pip install 'sdgp[plot]')\n")
    assert "Written" not in text
    assert list(Path().iterdir()) == []


@pytest.mark.usefixtures("tiny")
def test_bench_where_a_device_has_no_sparse_product(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    for products in (LinearProducts, Conv2dProducts):
        monkeypatch.setattr(products, "obstacle", lambda _: "tensor cores, got none")
    status, text, _ = command("bench", "--quick", "--device", "cpu", "--out", "results")
    assert status == 0
    assert text.count("none: needs tensor cores, got none") == 4


@pytest.mark.usefixtures("tiny")
def test_bench_shows_a_bar_to_a_person(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    status, text, progress = command("bench", "--quick", "--device", "cpu", "--json")
    assert status == 0
    assert json.loads(text)["train_step"]
    assert "[1/10]" not in progress
    assert "training step, transformer" in progress


def test_interleaved_takes_turns() -> None:
    calls: list[str] = []
    times = _timing.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 3)
    assert calls == list("aabb" * 3)  # an untimed call before each timed call
    assert set(times) == {"a", "b"}
    assert all(0 <= value < 1 for value in times.values())
