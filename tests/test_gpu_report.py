# SPDX-License-Identifier: BSD-3-Clause
"""Rehearses the report of a GPU without one: the CPU computes, and the GPU's name, clock and library are faked."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sdgp
from sdgp import _semi_structured as semi_structured
from sdgp._pattern import methods_on

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("torchvision")


class Event:
    """A CUDA event that reads the host's clock."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at) + 1e-6


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "get_device_name": lambda *_: "NVIDIA Rehearsal",
        "get_device_capability": lambda *_: (9, 0),
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 2**20,
        "empty_cache": lambda: None,
        "synchronize": lambda *_: None,
        "reset_peak_memory_stats": lambda *_: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "Event", Event)


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the modules of the benchmarks importable. Other tests have modules of these names."""
    names = {path.stem for path in BENCHMARKS.glob("*.py")}
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(BENCHMARKS)
    yield
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def gpu(faked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The measurements, with small shapes."""
    import bench  # type: ignore[import-not-found]
    import gpu  # type: ignore[import-not-found]
    import gpu_lines  # type: ignore[import-not-found]

    def product(grad: Tensor, pattern: sdgp.Pattern, method: str) -> semi_structured.Operand:
        pruned = sdgp.prune_nm(grad, *pattern, -1, method)
        return semi_structured.Operand(pruned, "cutlass_sm80", *pruned.shape, pruned.shape[1])

    def multiply_float8(matrix: Tensor, dense: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return (scale[:, None] * (matrix.float() @ dense.float().t())).to(dtype)

    def tiny() -> tuple[nn.Module, Tensor, Tensor, bool]:
        model = gpu.models.Llama(64, 4, 128, 1)
        return gpu.models.with_adapters(model, 4), torch.randint(256, (2, 8)), torch.randint(256, (2, 8)), False

    monkeypatch.setattr(semi_structured, "metadata_layout", lambda *_: "cutlass_sm80")
    monkeypatch.setattr(semi_structured, "pack", product)
    monkeypatch.setattr(semi_structured, "multiply", lambda operand, dense: operand.packed @ dense)
    monkeypatch.setattr(semi_structured, "multiply_float8", multiply_float8)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "pack_24", lambda x, n, m, method, *_: sdgp.prune_nm(x, n, m, -1, method))
    small = {"CUDA": torch.device("cpu"), "ROUNDS": 2, "TURN_MS": 0.0, "PACKED": (64, 64), "SQUARE": 64}
    small |= {"LINEARS": [("tiny", 64, 32, 64)], "MODELS": {"tiny": tiny}, "FLOAT8_MODELS": ("tiny",)}
    for name, value in small.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setitem(gpu.SUBJECTS, "prune_nm", lambda: gpu.prune_nm(1))
    if find_spec("torchao") is None:
        monkeypatch.delitem(gpu.SUBJECTS, "float8")
    for module in (bench, gpu_lines):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    module_: ModuleType = gpu
    return module_


def test_every_subject_is_measured_and_stored(
    gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        yield {"model": "tiny", **gpu.gradient_row(64, 32, 64, 1.0, 1.0)}
        raise RuntimeError("no memory")

    for subject in gpu.SUBJECTS:
        monkeypatch.setattr(sys, "argv", ["gpu", "--subject", subject, "--store", "x"])
        gpu.main()
    monkeypatch.setitem(gpu.SUBJECTS, "gradients", broken)
    monkeypatch.setattr(sys, "argv", ["gpu", "--store", "x"])
    with pytest.raises(SystemExit, match="stopped early: gradients"):  # and the others are measured
        gpu.main()
    stored = json.loads((tmp_path / "x.json").read_text())
    assert set(stored) == set(gpu.SUBJECTS)
    assert all(result["rows"] and result["machine"]["gpu"] == "NVIDIA Rehearsal" for result in stored.values())
    # The CPU of the rehearsal has more methods than CUDA.
    assert all(set(row["of_clone"]) == set(methods_on("cuda")) for row in stored["prune_nm"]["rows"])
    report = (tmp_path / "x.md").read_text()
    assert all(f"## {subject}\n" in report for subject in gpu.SUBJECTS)
    assert "gradients: stopped after 1 rows: no memory" in capsys.readouterr().out
    import plot  # type: ignore[import-not-found]

    monkeypatch.setattr(sys, "argv", ["plot", str(tmp_path / "x.json")])
    plot.main()
    assert (tmp_path / "x.png").stat().st_size > 1000


def test_a_failing_part_does_not_stop_the_next(
    faked: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_report  # type: ignore[import-not-found]

    ran: dict[str, tuple[list[str], float]] = {}

    def run(part: str, words: list[str], seconds: float) -> bool:
        ran[part] = words, seconds
        return part not in failing

    monkeypatch.setattr(gpu_report, "run", run)
    monkeypatch.setattr(gpu_report, "missing", lambda part: "compute-sanitizer" if part == "sanitizer" else None)
    failing = {"tests", "pack"}
    monkeypatch.setattr(sys, "argv", ["gpu_report", "--minutes", "5"])
    with pytest.raises(SystemExit, match="failed: tests, pack"):
        gpu_report.main()
    assert list(ran) == [part for part in gpu_report.PARTS if part != "sanitizer"]
    assert "sanitizer: left out, needs compute-sanitizer" in capsys.readouterr().out
    assert "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=90-real" in ran["build"][0]
    assert "nvidia-rehearsal" in ran["pack"][0]
    assert "benchmarks/results/nvidia-rehearsal-gpt.jsonl" in ran["gpt_pruned"][0]
    assert all(seconds <= 300 * gpu_report.PARTS[part] for part, (_, seconds) in ran.items())
    ran.clear()
    failing = {"build"}
    with pytest.raises(SystemExit, match="failed: build"):
        gpu_report.main()
    assert list(ran) == ["build"]


def test_training_runs_leave_result_lines(tmp_path: Path) -> None:
    import gpu_report

    small = ("size=tiny", "context=16", "epochs=2", "epoch_steps=2", "batch_size=2", "amp=off", "validation_bytes=64")
    settings = [word for setting in small for word in ("--set", setting)]
    results = tmp_path / "lines.jsonl"
    for part in ("gpt_plain", "gpt_pruned"):
        python, *words = gpu_report.command(part, "x", 60)
        words[words.index("--results") + 1] = str(results)
        words[words.index("--out") + 1] = str(tmp_path)
        words += [*settings, "--device", "cpu", "--threads", "1"]
        subprocess.run([python, *words], cwd=BENCHMARKS.parent, check=True)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["row"], line["config"]["exact_first"]) for line in lines] == [("plain", 0), ("mvue 2:4", 1)]


def test_a_command_that_fails_or_takes_too_long(faked: None, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu_report

    python = sys.executable
    assert gpu_report.run("good", [python, "-c", "pass"], 60)
    assert not gpu_report.run("bad", [python, "-c", "raise SystemExit(3)"], 60)
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(77)'])"
    assert not gpu_report.run("slow", [python, "-c", child], 1)
    end = time.monotonic() + 30  # a killed process needs a moment to end
    while left := [path for path in Path("/proc").glob("[0-9]*/cmdline") if b"time.sleep(77)" in path.read_bytes()]:
        assert time.monotonic() < end, left
        time.sleep(0.1)
    said = capsys.readouterr().out
    assert all(text in said for text in ("good: ok", "bad: failed with 3", "slow: out of time"))


def test_no_gpu_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_report

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_report"])
    with pytest.raises(SystemExit, match="expected a GPU, got torch"):
        gpu_report.main()
