# SPDX-License-Identifier: BSD-3-Clause
"""What bad input gets: each message, on the CPU, on the meta device and in inference mode."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sdgp

X = torch.randn(4, 8)

PRUNE_NM: list[tuple[str, Callable[[torch.Tensor], Any], str]] = [
    ("n > m", lambda x: sdgp.prune_nm(x, 5, 4), "expected 1 <= n <= m <= 64, got n=5, m=4"),
    ("n < 1", lambda x: sdgp.prune_nm(x, 0, 4), "expected 1 <= n <= m <= 64, got n=0, m=4"),
    ("m > 64", lambda x: sdgp.prune_nm(x, 2, 65), "expected 1 <= n <= m <= 64, got n=2, m=65"),
    ("n = m > 64", lambda x: sdgp.prune_nm(x, 65, 65), "expected 1 <= n <= m <= 64, got n=65, m=65"),
    ("dim", lambda x: sdgp.prune_nm(x, 2, 4, dim=2), "expected dim in [-2, 1], got 2"),
    ("negative dim", lambda x: sdgp.prune_nm(x, 2, 4, dim=-3), "expected dim in [-2, 1], got -3"),
    ("scalar", lambda x: sdgp.prune_nm(x[0, 0], 2, 4), "expected at least 1 dimension, got a scalar"),
    (
        "method",
        lambda x: sdgp.prune_nm(x, 2, 4, method="max"),
        'expected method to be one of magnitude, random, rescale, rescale_group, mvue, got "max"',
    ),
    *(
        (
            str(dtype),
            lambda x, dtype=dtype: sdgp.prune_nm(x.to(dtype), 2, 4),
            f"expected float32, float64, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}",
        )
        for dtype in (torch.int64, torch.int8, torch.uint8, torch.bool, torch.complex64)
    ),
    (
        "float8",
        lambda x: sdgp.prune_nm(x.to(torch.float8_e4m3fn), 2, 4),
        "expected float32, float64, float16 or bfloat16, got another dtype",
    ),
    (
        "seed's dtype",
        lambda x: sdgp.prune_nm(x, 2, 4, method="mvue", seed=torch.zeros(1, dtype=torch.int32, device=x.device)),
        "expected seed to be int64, got Int",
    ),
    (
        "seed's size",
        lambda x: sdgp.prune_nm(x, 2, 4, seed=torch.zeros(2, dtype=torch.int64, device=x.device)),
        "expected seed to have one element, got 2",
    ),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize(("call", "message"), [case[1:] for case in PRUNE_NM], ids=[case[0] for case in PRUNE_NM])
def test_prune_nm(call: Callable[[torch.Tensor], Any], message: str, mode: Callable[[], Any], device: str) -> None:
    with mode(), pytest.raises(RuntimeError, match=f"^prune_nm: {re.escape(message)}$"):
        call(X.to(device))


def test_prune_nm_seed_on_another_device() -> None:
    with pytest.raises(
        RuntimeError, match=r"^prune_nm: expected seed on the input's device \(cpu\), got another device$"
    ):
        sdgp.prune_nm(X, 2, 4, method="mvue", seed=torch.zeros(1, dtype=torch.int64, device="meta"))


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (X.to_sparse, "sparse_coo"),
        (X.to_sparse_csr, "sparse_csr"),
        (X.to_sparse_csc, "sparse_csc"),
        (lambda: X.to_sparse_bsr((2, 2)), "sparse_bsr"),
        (X.to_mkldnn, "mkldnn"),
    ],
)
def test_prune_nm_layout(make: Callable[[], torch.Tensor], layout: str) -> None:
    expected = f"prune_nm: expected a strided tensor, got layout {layout}; call .to_dense() first"
    with pytest.raises(RuntimeError, match=f"^{re.escape(expected)}$"):
        sdgp.prune_nm(make(), 2, 4)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_prune_nm_quantized() -> None:
    quantized = torch.quantize_per_tensor(X, 0.1, 0, torch.qint8)
    with pytest.raises(
        RuntimeError, match=r"^prune_nm: expected float32, float64, float16 or bfloat16, got another dtype$"
    ):
        sdgp.prune_nm(quantized, 2, 4)


@pytest.mark.parametrize(
    "pattern", ["2-4", "0:4", "4:2", "2:65", "2", "2:4:8", "a:b", "", "2.0:4", "-1:4", (4, 2), (2,), 2, None, (2.0, 4)]
)
def test_pattern(pattern: Any) -> None:
    expected = f'pattern: expected "n:m" or (n, m) with 1 <= n <= m <= 64, got {pattern!r}'
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        sdgp.Pattern.parse(pattern)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        sdgp.convert(nn.Linear(8, 8), pattern)


CONV = nn.Conv2d(4, 8, 3)
IMAGE = torch.randn(2, 4, 8, 8, requires_grad=True)
METHODS = "expected method to be one of magnitude, random, rescale, rescale_group, mvue, got 'max'"
SPARSE = (
    'expected a backend with a kernel, got "sparse", which has none in this version; '
    'use "pruned" for the same gradients through the dense product'
)

PYTHON: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: sdgp.linear(X, torch.randn(16, 9)),
        "linear: expected input (..., in) and weight (out, in), got input (4, 8) and weight (16, 9)",
    ),
    (
        lambda: sdgp.linear(X, torch.randn(8)),
        "linear: expected input (..., in) and weight (out, in), got input (4, 8) and weight (8,)",
    ),
    (
        lambda: sdgp.conv2d(X, CONV.weight),
        "conv2d: expected input (N, C, H, W) or (C, H, W) and weight (out, C / 1, kH, kW), "
        "got input (4, 8) and weight (8, 4, 3, 3)",
    ),
    (
        lambda: sdgp.conv2d(IMAGE, CONV.weight, groups=2),
        "conv2d: expected input (N, C, H, W) or (C, H, W) and weight (out, C / 2, kH, kW), "
        "got input (2, 4, 8, 8) and weight (8, 4, 3, 3)",
    ),
    (
        lambda: sdgp.conv2d(IMAGE, CONV.weight, padding="some", backend="pruned"),
        'conv2d: expected padding to be a number, a pair, "same" or "valid", got \'some\'',
    ),
    (
        lambda: sdgp.conv2d(IMAGE, CONV.weight, stride=2, padding="same", backend="pruned"),
        'conv2d: expected stride 1 with padding="same", got (2, 2)',
    ),
    (lambda: sdgp.linear(X, torch.randn(8, 8), method="max"), f"linear: {METHODS}"),
    (lambda: sdgp.conv2d(IMAGE, CONV.weight, method="max"), f"conv2d: {METHODS}"),
    (lambda: sdgp.Linear(8, 8, method="max"), f"Linear: {METHODS}"),
    (lambda: sdgp.convert(nn.Linear(8, 8), method="max"), f"convert: {METHODS}"),
    (lambda: sdgp.linear(X, torch.randn(8, 8), backend="sparse"), f"linear: {SPARSE}"),
    (lambda: sdgp.Conv2d(4, 8, 3, backend="sparse"), f"Conv2d: {SPARSE}"),
    (lambda: sdgp.convert(nn.Linear(8, 8), backend="sparse"), f"convert: {SPARSE}"),
    (
        lambda: sdgp.convert(nn.Linear(8, 8), backend="fast"),
        "convert: expected backend to be one of auto, pruned, sparse, dense, got 'fast'",
    ),
    (lambda: sdgp.Linear.from_dense(nn.Conv2d(4, 8, 3)), "from_dense: expected an nn.Linear, got Conv2d"),
    (lambda: sdgp.convert("resnet18"), "convert: expected an nn.Module, got str"),  # type: ignore[type-var]
    (lambda: sdgp.revert(None), "revert: expected an nn.Module, got NoneType"),  # type: ignore[type-var]
    (lambda: sdgp.report(X), "report: expected an nn.Module, got Tensor"),  # type: ignore[arg-type]
    (
        lambda: sdgp.paused(X).__enter__(),  # type: ignore[arg-type]
        "paused: expected an nn.Module, got Tensor",
    ),
    (
        lambda: sdgp.convert(nn.Sequential(nn.Linear(8, 8)), filter=lambda module, name: None),  # type: ignore[arg-type,return-value]
        "convert: expected filter to return a bool, got None for 0",
    ),
]


@pytest.mark.parametrize(("call", "message"), PYTHON, ids=[message[:48] for _, message in PYTHON])
def test_python(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_a_refused_conversion_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"^convert: expected filter"):
        sdgp.convert(model, filter=lambda module, name: name == "0" or None)  # type: ignore[arg-type,return-value]
    assert all(type(layer) is nn.Linear for layer in model)


# A broken install.


def import_under(tmp_path: Path, files: dict[str, str], **environment: str) -> str:
    """The last line of stderr of `import sdgp` with some modules replaced."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", "import sdgp"],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def test_old_torch(tmp_path: Path) -> None:
    last = import_under(tmp_path, {"torch.py": "__version__ = '2.9.1+cpu'"})
    assert last == "ImportError: sdgp needs torch >= 2.10, found 2.9.1+cpu: pip install --upgrade 'torch>=2.10'"


def test_no_torch(tmp_path: Path) -> None:
    last = import_under(tmp_path, {"torch.py": "raise ImportError('gone')"})
    assert last == "ImportError: sdgp needs torch >= 2.10, found none that imports: pip install 'torch>=2.10'"


def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    last = import_under(tmp_path, {"torch.py": "__version__ = '2.13.0'"})  # a torch without libraries
    assert last.startswith("ImportError: sdgp's compiled library did not load under torch 2.13.0: ")
    assert last.endswith("reinstall sdgp (a source checkout is not importable in place: pip install -e .)")


def test_unknown_instruction_set(tmp_path: Path) -> None:
    last = import_under(tmp_path, {}, SDGP_FORCE_ISA="sse9")
    assert re.fullmatch(
        r"RuntimeError: SDGP_FORCE_ISA: expected an instruction set that this CPU runs \((.*, )?baseline\), got sse9",
        last,
    )
