# SPDX-License-Identifier: BSD-3-Clause
"""Tests sdgp.Pattern: what it parses, what it refuses, and which patterns also fit 2:4."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

import sdgp
from sdgp._pattern import BACKENDS, METHODS, Pruning


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ("2:4", (2, 4)),
        ((1, 2), (1, 2)),
        ([3, 5], (3, 5)),
        (sdgp.Pattern(4, 8), (4, 8)),
        ("1:1", (1, 1)),
        ("64:64", (64, 64)),
        ("0002:0064", (2, 64)),
    ],
)
def test_parse(given: Any, pattern: tuple[int, int]) -> None:
    found = sdgp.Pattern.parse(given)
    assert type(found) is sdgp.Pattern
    assert found == pattern
    assert str(found) == f"{pattern[0]}:{pattern[1]}"


@pytest.mark.parametrize(
    "given",
    [
        *("0:4", "5:4", "1:65", "65:65", "2-4", "2:4:8", " 2:4", "2:4\n", "00002:4", "2:00004", ""),
        *((0, 4), (-1, 4), (5, 4), (1, 65), (2,), (2, 4, 8), (2.0, 4), (2, 4.0), (True, 4), (1, True), ("2", "4")),
        *({2: 4}, {2: 1, 4: 1}, 24, None),
    ],
    ids=repr,
)
def test_refuses(given: Any) -> None:
    message = f'pattern: expected "n:m" or (n, m) with 1 <= n <= m <= 64, got {given!r}'
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sdgp.Pattern.parse(given)


def test_fits_24() -> None:
    """A pattern fits 2:4 if m is a multiple of 4 and n <= 2, or if it is 1:2, because two pairs make four values."""
    for m in range(1, 13):
        for n in range(1, m + 1):
            whole_fours = m in (4, 8, 12) and n in (1, 2)
            assert sdgp.Pattern(n, m).fits_24 == (whole_fours or (n, m) == (1, 2))


def test_settings() -> None:
    settings = Pruning.parse("op", "2:4", "mvue", "auto")
    assert settings == Pruning(sdgp.Pattern(2, 4), "mvue", "auto")
    assert settings != Pruning(sdgp.Pattern(2, 4), "mvue", "pruned")
    assert hash(settings) == hash(Pruning.parse("op", (2, 4), "mvue", "auto"))
    assert str(settings) == "pattern=2:4, method=mvue, backend=auto"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.method = "random"  # type: ignore[misc]
    assert not settings.is_identity
    assert Pruning.parse("op", "4:4", "mvue", "auto").is_identity
    assert BACKENDS == ("auto", "pruned", "sparse", "dense")
    for wrong, message in {
        ("2:4", "topk", "auto"): f"op: expected method to be one of {', '.join(METHODS)}, got 'topk'",
        ("2:4", "mvue", "fast"): "op: expected backend to be one of auto, pruned, sparse, dense, got 'fast'",
        ("4:2", "mvue", "auto"): "pattern: expected \"n:m\" or (n, m) with 1 <= n <= m <= 64, got '4:2'",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            Pruning.parse("op", *wrong)
