# SPDX-License-Identifier: BSD-3-Clause
"""Tests the rules that choose a product without a measurement."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sdgp
from sdgp._pattern import Pruning
from sdgp._rules import obstacle, static_rule


@pytest.mark.parametrize(
    ("change", "sparse"),
    [
        ({}, True),
        ({"op": "conv2d"}, False),
        ({"gradient": "weight"}, False),
        ({"pattern": "4:8"}, False),
        ({"dtype": torch.float32}, False),
        ({"weight_shape": (4096, 1024)}, False),
        ({"values": 4095 * 4096}, False),
    ],
    ids=str,
)
def test_static_rule_of_a_gpu(change: dict[str, Any], sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule must follow measurements of others: large linear layers, 2:4, 16 bits."""

    def obstacle(device: torch.device, dtype: torch.dtype, pattern: sdgp.Pattern) -> str | None:
        return None if dtype == torch.bfloat16 and pattern.fits_24 else "missing"

    monkeypatch.setattr("sdgp._semi_structured.obstacle", obstacle)
    case = {"op": "linear", "gradient": "data", "dtype": torch.bfloat16, "weight_shape": (4096, 2048)} | change
    pruning = Pruning.parse("test", case.pop("pattern", "2:4"), "mvue", "auto")
    values = case.pop("values", 4096 * 4096)
    assert static_rule(pruning=pruning, device=torch.device("cuda"), values=values, **case) is sparse


@pytest.mark.parametrize("op", ["linear", "conv2d", "float8_linear"])
def test_unstructured_needs_a_cpu(op: str) -> None:
    pruning = Pruning.parse("test", "2:4", "unstructured", "auto")
    why = obstacle(op, "data", pruning, torch.device("cuda"), torch.bfloat16)
    assert why == "a cpu for the method unstructured, got cuda"
    if op != "float8_linear":
        assert obstacle(op, "data", pruning, torch.device("cpu"), torch.bfloat16) is None
