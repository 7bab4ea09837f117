# SPDX-License-Identifier: BSD-3-Clause
"""Tests what is recorded with a measurement: the machine, the versions and the commit."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import sdgp
from sdgp import _machine


def test_outside_of_a_repository(tmp_path: Path) -> None:
    found = _machine.machine(tmp_path, "python")
    assert found["commit"] == "unknown"
    assert (found["torch"], found["sdgp"]) == (torch.__version__, sdgp.__version__)
    assert found["python"] == platform.python_version()
    assert found["threads"] == torch.get_num_threads()


def test_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert _machine.machine(tmp_path)["commit"] == "unknown"


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        author = ("-c", "user.name=me", "-c", "user.email=me@localhost")
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "--quiet")
    for name in ("measured", "other"):
        (tmp_path / name).write_text("1")
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "--short", "HEAD")
    (tmp_path / "other").write_text("2")
    assert _machine.machine(tmp_path, "measured")["commit"] == commit
    (tmp_path / "measured").write_text("2")
    assert _machine.machine(tmp_path, "measured")["commit"] == f"{commit}-dirty"
    assert _machine.changes(tmp_path, "measured") == " M measured"


def test_cpu_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_machine, "cpu_fields", lambda: {"model name": "A CPU", "cpu family": "6", "model": "207"})
    assert _machine.cpu_name() == "A CPU (family 6, model 207)"
    monkeypatch.setattr(_machine, "cpu_fields", dict)
    assert _machine.cpu_name() == (platform.processor() or platform.machine())
