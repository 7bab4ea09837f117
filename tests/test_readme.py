# SPDX-License-Identifier: BSD-3-Clause
"""The README's Python blocks and the docstrings' examples run as they stand."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch

import sdgp
from sdgp import autograd, modules, ops, pattern, schedule

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_block(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    exec(compile(block, "README.md", "exec"), {})
    if "sdgp.report" in block:
        assert "| pruned" in capsys.readouterr().out


@pytest.mark.parametrize("module", [autograd, modules, ops, pattern, schedule], ids=lambda module: module.__name__)
def test_docstrings(module: object) -> None:
    results = doctest.testmod(module, extraglobs={"sdgp": sdgp, "torch": torch})  # type: ignore[arg-type]
    assert results.attempted > 0
    assert results.failed == 0
