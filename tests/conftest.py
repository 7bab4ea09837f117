# SPDX-License-Identifier: BSD-3-Clause
from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from advice import Told, as_expected
from command_line import Command
from hypothesis import settings

import sdgp_cli

settings.register_profile("sdgp", deadline=None, print_blob=True, derandomize=True)
settings.load_profile("sdgp")


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Starts each test from the same generator state and restores the old state afterwards."""
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits this process and its child processes to one thread.

    A busy machine may split a sum over fewer threads than requested.
    """
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives products and steps fixed times, so that no result of sdgp.advise depends on a clock."""
    monkeypatch.setattr("sdgp._steps.seconds", lambda call, device: (call(), 0.010)[1])
    monkeypatch.setattr("sdgp._steps.Steps.realized", as_expected)
    with Told():
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Command]:
    """Runs `sdgp ...` in this process and in an empty folder, and restores the state of the process afterwards."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            status = sdgp_cli.main(arguments)
        except SystemExit as exit:
            status = int(exit.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield run
    torch.set_num_threads(threads)
