# SPDX-License-Identifier: BSD-3-Clause
"""Tests the error messages of layers, functions and conversions, for bad input."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from errors import elsewhere, message
from torch import nn

import sdgp
from sdgp._pattern import METHODS

X = torch.randn(4, 8)


@pytest.mark.parametrize(
    "pattern",
    [
        "1" * 5000 + ":4",
        "2-4",
        "0:4",
        "4:2",
        "2:65",
        "2",
        "2:4:8",
        "a:b",
        "",
        "2.0:4",
        "-1:4",
        (4, 2),
        (2,),
        2,
        None,
        (2.0, 4),
    ],
)
def test_pattern(pattern: Any) -> None:
    expected = f'pattern: expected "n:m" or (n, m) with 1 <= n <= m <= 64, got {pattern!r}'
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        sdgp.Pattern.parse(pattern)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        sdgp.convert(nn.Linear(8, 8), pattern)


LAYER = nn.Conv2d(4, 8, 3)
IMAGE = torch.randn(2, 4, 8, 8, requires_grad=True)
KNOWN = ", ".join(METHODS)


PYTHON: list[tuple[Callable[[], Any], str, str, str]] = [
    (lambda: sdgp.linear(X, torch.randn(16, 9)), "linear", "(out, in)", "input (4, 8) and weight (16, 9)"),
    (lambda: sdgp.linear(X, torch.randn(8)), "linear", "(out, in)", "input (4, 8) and weight (8,)"),
    (
        lambda: sdgp.conv2d(X, LAYER.weight),
        "conv2d",
        "(out, C / 1, kH, kW)",
        "input (4, 8) and weight (8, 4, 3, 3)",
    ),
    (
        lambda: sdgp.conv2d(IMAGE, LAYER.weight, groups=2),
        "conv2d",
        "(out, C / 2, kH, kW)",
        "input (2, 4, 8, 8) and weight (8, 4, 3, 3)",
    ),
    (lambda: sdgp.conv2d(IMAGE, LAYER.weight, padding="some", backend="pruned"), "conv2d", "padding", "'some'"),
    (
        lambda: sdgp.conv2d(IMAGE, LAYER.weight, stride=2, padding="same", backend="pruned"),
        "conv2d",
        'stride 1 with padding="same"',
        "(2, 2)",
    ),
    (lambda: sdgp.linear(X, torch.randn(8, 8), method="max"), "linear", KNOWN, "'max'"),
    (lambda: sdgp.conv2d(IMAGE, LAYER.weight, method="max"), "conv2d", KNOWN, "'max'"),
    (lambda: sdgp.Linear(8, 8, method="max"), "Linear", KNOWN, "'max'"),
    (lambda: sdgp.convert(nn.Linear(8, 8), method="max"), "convert", KNOWN, "'max'"),
    (lambda: sdgp.convert(nn.Linear(8, 8), backend="fast"), "convert", "auto, pruned, sparse, dense", "'fast'"),
    (lambda: sdgp.linear(X, torch.randn(8, 8), weight_grad="16:4"), "linear", "weight_grad", "'16:4'"),
    (lambda: sdgp.conv2d(IMAGE, LAYER.weight, weight_grad=(2.0, 4)), "conv2d", "weight_grad", "(2.0, 4)"),
    (lambda: sdgp.Linear(8, 8, weight_grad="mvue"), "Linear", "weight_grad", "'mvue'"),
    (lambda: sdgp.Conv2d(8, 8, 3, weight_grad=4), "Conv2d", "weight_grad", "4"),  # type: ignore[arg-type]
    (
        lambda: sdgp.convert(nn.Linear(8, 8), weight_grad=("2:4", "max")),
        "convert",
        f"method to be one of {KNOWN}",
        "'max'",
    ),
    (lambda: sdgp.convert(nn.Linear(8, 8), weight_grad=()), "convert", "weight_grad", "()"),  # type: ignore[arg-type]
    (
        lambda: sdgp.Linear.from_plain(nn.Conv2d(4, 8, 3)),
        "from_plain",
        "torch.nn.modules.linear.Linear",
        "a torch.nn.modules.conv.Conv2d",
    ),
    (lambda: sdgp.convert("resnet18"), "convert", "nn.Module", "str"),  # type: ignore[type-var]
    (lambda: sdgp.revert(None), "revert", "nn.Module", "NoneType"),  # type: ignore[type-var]
    (lambda: sdgp.report(X), "report", "nn.Module", "Tensor"),  # type: ignore[arg-type]
    (lambda: sdgp.paused(X).__enter__(), "paused", "nn.Module", "Tensor"),  # type: ignore[arg-type]
    (
        lambda: sdgp.convert(nn.Sequential(nn.Linear(8, 8)), filter=lambda module, name: None),  # type: ignore[arg-type,return-value]
        "convert",
        "filter to return a bool",
        "None for 0",
    ),
    (lambda: sdgp.Chooser(rounds=0), "Chooser", "rounds >= 1", "0"),
    (lambda: sdgp.Chooser(limit=0), "Chooser", "limit >= 1", "5 and 0"),
    (lambda: sdgp.Chooser(margin=-1), "Chooser", "margin > 0", "-1 and 0.1"),
    (lambda: sdgp.Chooser(calls_ms=float("nan")), "Chooser", "calls_ms >= 0", "0.95 and nan"),
]


@pytest.mark.parametrize(
    ("call", "op", "requirement", "got"), PYTHON, ids=[f"{op}: {requirement}" for _, op, requirement, _ in PYTHON]
)
def test_python(call: Callable[[], Any], op: str, requirement: str, got: str) -> None:
    with pytest.raises(ValueError, match=message(op, requirement, got)):
        call()


@pytest.mark.parametrize("layer", [sdgp.Linear(8, 8, backend="sparse"), sdgp.Conv2d(4, 8, 3, backend="sparse")])
def test_a_forced_sparse_product_on_a_device_without_one(layer: nn.Module) -> None:
    x = X if isinstance(layer, nn.Linear) else IMAGE
    output = layer.to("meta")(x.detach().to("meta").requires_grad_())
    op = type(layer).__name__.lower()
    with pytest.raises(ValueError, match=rf'^{op}: backend="sparse" expected .*\(cpu, cuda\), got meta; use "pruned"'):
        output.sum().backward()


@pytest.mark.parametrize("backend", ["pruned", "sparse", "dense"])
def test_a_device_without_kernels(backend: str) -> None:
    x = elsewhere(X).requires_grad_()
    with pytest.raises(ValueError, match=f'^linear: backend="{backend}" expected tensors on cpu or cuda, got xpu; use'):
        sdgp.linear(x, elsewhere(torch.empty(16, 8)), backend=backend)


def test_a_refused_conversion_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"^convert: expected filter"):
        sdgp.convert(model, filter=lambda module, name: name == "0" or None)  # type: ignore[arg-type,return-value]
    assert all(type(layer) is nn.Linear for layer in model)
