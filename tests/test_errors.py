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
from samples import DTYPES
from torch import nn

import sdgp

X = torch.randn(4, 8)

OPS = {"prune_nm": sdgp.prune_nm, "_prune_nm_scale": torch.ops.sdgp._prune_nm_scale}

PRUNE_NM: list[tuple[str, Callable[[Any, torch.Tensor], Any], str]] = [
    ("n > m", lambda op, x: op(x, 5, 4), "expected 1 <= n <= m <= 64, got n=5, m=4"),
    ("n < 1", lambda op, x: op(x, 0, 4), "expected 1 <= n <= m <= 64, got n=0, m=4"),
    ("m > 64", lambda op, x: op(x, 2, 65), "expected 1 <= n <= m <= 64, got n=2, m=65"),
    ("n = m > 64", lambda op, x: op(x, 65, 65), "expected 1 <= n <= m <= 64, got n=65, m=65"),
    ("dim", lambda op, x: op(x, 2, 4, dim=2), "expected dim in [-2, 1], got 2"),
    ("negative dim", lambda op, x: op(x, 2, 4, dim=-3), "expected dim in [-2, 1], got -3"),
    ("scalar", lambda op, x: op(x[0, 0], 2, 4), "expected at least 1 dimension, got a scalar"),
    (
        "method",
        lambda op, x: op(x, 2, 4, method="max"),
        'expected method to be one of magnitude, random, rescale, rescale_group, mvue, got "max"',
    ),
    (
        "seed's dtype",
        lambda op, x: op(x, 2, 4, method="mvue", seed=torch.zeros(1, dtype=torch.int32, device=x.device)),
        "expected seed to be int64, got int32",
    ),
    (
        "seed's size",
        lambda op, x: op(x, 2, 4, seed=torch.zeros(2, dtype=torch.int64, device=x.device)),
        "expected seed to have one element, got 2",
    ),
]


def message(op: str, text: str) -> str:
    return f"^{op}: {re.escape(text)}$"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize(("call", "text"), [case[1:] for case in PRUNE_NM], ids=[case[0] for case in PRUNE_NM])
def test_prune_nm(
    call: Callable[[Any, torch.Tensor], Any], text: str, mode: Callable[[], Any], device: str, op: str
) -> None:
    with mode(), pytest.raises(RuntimeError, match=message(op, text)):
        call(OPS[op], X.to(device))


QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
OTHER_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)} - {*DTYPES}, key=str)


@pytest.mark.filterwarnings("ignore:.*(support is experimental|quantize)")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_prune_nm_dtype(dtype: torch.dtype, op: str) -> None:
    expected = f"expected float32, float64, float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    for device in ("cpu",) if dtype in QUANTIZED else ("cpu", "meta"):
        with pytest.raises(RuntimeError, match=message(op, expected)):
            OPS[op](torch.empty(4, 8, dtype=dtype, device=device), 2, 4)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_prune_nm_quantized_seed() -> None:
    seed = torch.quantize_per_tensor(X[:1, 0], 0.1, 0, torch.quint8)
    with pytest.raises(RuntimeError, match=message("prune_nm", "expected seed to be int64, got quint8")):
        sdgp.prune_nm(X, 2, 4, method="mvue", seed=seed)


class _Elsewhere(torch.Tensor):
    """A tensor without data that says it is on a device which this torch may well not have."""

    @staticmethod
    def on(device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(_Elsewhere, (1,), device=device, dtype=dtype)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        python = torch._C.DispatchKeySet(torch._C.DispatchKey.Python)
        with torch._C._ExcludeDispatchKeyGuard(
            python | torch._C.DispatchKeySet(torch._C.DispatchKey.PythonTLSSnapshot)
        ):
            return func(*args, **kwargs or {})


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu", "mps", "xla:0", "hpu", "mtia", "lazy", "privateuseone:0"])
def test_prune_nm_on_a_device_without_a_kernel(device: str, op: str) -> None:
    expected = f"expected a tensor on a device with an sdgp kernel (cpu), got {device}"
    with pytest.raises(RuntimeError, match=message(op, expected)):
        OPS[op](_Elsewhere.on(device), 1, 2)
    with pytest.raises(RuntimeError, match=message(op, f"expected seed on the input's device (cpu), got {device}")):
        OPS[op](X, 2, 4, method="mvue", seed=_Elsewhere.on(device, torch.int64))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(("device", "other"), [("cpu", "meta"), ("meta", "cpu")])
def test_prune_nm_seed_on_another_device(device: str, other: str, op: str) -> None:
    seed = torch.zeros(1, dtype=torch.int64, device=other)
    expected = f"expected seed on the input's device ({device}), got {other}"
    with pytest.raises(RuntimeError, match=message(op, expected)):
        OPS[op](X.to(device), 2, 4, method="mvue", seed=seed)


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
    expected = f"expected a strided tensor, got layout {layout}; call .to_dense() first"
    for op, call in OPS.items():
        with pytest.raises(RuntimeError, match=message(op, expected)):
            call(make(), 2, 4)


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


CONV = nn.Conv2d(4, 8, 3)
IMAGE = torch.randn(2, 4, 8, 8, requires_grad=True)
METHODS = "expected method to be one of magnitude, random, rescale, rescale_group, mvue, got 'max'"
SPARSE = (
    'expected backend="sparse" on a device with a sparse product (cpu), got meta; '
    'use "pruned" for the same gradients through the faster product there is'
)


def backward_on_meta(layer: nn.Module, x: torch.Tensor) -> None:
    layer.to("meta")(x.detach().to("meta").requires_grad_()).sum().backward()


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
    (lambda: backward_on_meta(sdgp.Linear(8, 8, backend="sparse"), X), f"linear: {SPARSE}"),
    (lambda: backward_on_meta(sdgp.Conv2d(4, 8, 3, backend="sparse"), IMAGE), f"conv2d: {SPARSE}"),
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
