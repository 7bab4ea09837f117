# SPDX-License-Identifier: BSD-3-Clause
"""Runs one self-test per public op and device, which compares results on small random inputs with ``sdgp.reference``.

The self-tests check that the installation computes correctly on this machine. They do not replace the test suite.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sdgp import _autograd, _ops, _semi_structured, reference
from sdgp._pattern import BACKENDS, Pattern, methods_on

PATTERNS = ((2, 4), (4, 32), (3, 7))  # two patterns with a specialized kernel, one without

#: A description, the actual and the expected result, and the largest relative error from rounding; 0 means bit for bit.
Comparison = tuple[str, Tensor, Tensor, float]


class Skipped(Exception):
    """Raised if a device does not have an op. The message is the reason."""


def run() -> list[dict[str, str]]:
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return [_result(op, device, test) for device in devices for op, test in _TESTS.items()]


def _result(op: str, device: torch.device, test: Callable[[torch.device], Iterator[Comparison]]) -> dict[str, str]:
    torch.manual_seed(0)
    state, done = "ok", 0
    try:
        for what, actual, expected, tolerance in test(device):
            _compare(what, actual, expected, tolerance)
            done += 1
        note = f"{done} comparisons"
    except Skipped as reason:
        state, note = "skipped", str(reason)
    except Exception as error:  # any exception of a broken installation is the result
        state, note = "failed", f"{type(error).__name__}: {str(error).splitlines()[0]} (after {done} comparisons)"
    return {"op": op, "device": str(device), "state": state, "note": note}


def _compare(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
        raise AssertionError(
            f"{what}: expected {expected.dtype} {tuple(expected.shape)}, got {actual.dtype} {tuple(actual.shape)}"
        )
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    if not error <= tolerance:  # NaN fails too
        raise AssertionError(f"{what}: expected a relative error of at most {tolerance:.0e}, got {error:.1e}")


def _prune_nm(device: torch.device) -> Iterator[Comparison]:
    seed = torch.tensor([7], device=device)
    for dtype in _ops.PRUNED_DTYPES:
        for shape, dim in (((37, 70), -1), ((2, 64, 5, 5), 1)):
            x = torch.randn(shape).to(device, dtype)
            for n, m in PATTERNS:
                for method in methods_on(device.type):
                    what = f"{method} {n}:{m}, {dtype}, dim {dim}"
                    arguments = (x, n, m, dim, method, seed)
                    tolerance = 2 * torch.finfo(dtype).eps if method == "rescale" else 0.0  # summation order varies
                    yield what, _ops.prune_nm(*arguments), reference.prune_nm(*arguments), tolerance


def _compress_nm(device: torch.device) -> Iterator[Comparison]:
    _need_kernel("compress_nm", device)
    for dtype in _ops.PRUNED_DTYPES:
        x = torch.randn(37, 70).to(device, dtype)
        for n, m in PATTERNS:
            found, expected = _ops.compress_nm(x, n, m), reference.compress_nm(x, n, m)
            for part, actual, wanted in zip(("values", "indices"), found, expected, strict=True):
                yield f"{part} of {n}:{m}, {dtype}", actual, wanted, 0.0


def _decompress_nm(device: torch.device) -> Iterator[Comparison]:
    _need_kernel("decompress_nm", device)
    for what, x, compressed, m in _compressed(device):
        arguments = (*compressed, m, x.shape[-1])
        yield what, _ops.decompress_nm(*arguments), reference.decompress_nm(*arguments), 0.0


def _spmm_nm(device: torch.device) -> Iterator[Comparison]:
    _need_kernel("spmm_nm", device)
    for what, x, compressed, m in _compressed(device):
        arguments = (*compressed, m, torch.randn(x.shape[-1], 40).to(x))
        yield what, _ops.spmm_nm(*arguments), reference.spmm_nm(*arguments), _rounding(x.dtype)


def _compressed(device: torch.device) -> Iterator[tuple[str, Tensor, tuple[Tensor, Tensor], int]]:
    for dtype in _ops.PRUNED_DTYPES:
        x = torch.randn(37, 70).to(device, dtype)
        for n, m in PATTERNS:
            yield f"{n}:{m}, {dtype}", x, reference.compress_nm(x, n, m), m


def _linear(backend: str, device: torch.device) -> Iterator[Comparison]:
    # These are 2^24 multiply-adds, the least that auto measures on a CPU.
    input, weight, grad_output = (torch.randn(256, 256) for _ in range(3))
    input, weight, grad_output = _on(device, input, weight, grad_output)
    for n, m in _patterns(backend, device):
        settings: Any = {"pattern": f"{n}:{m}", "method": "magnitude", "backend": backend}
        found = _gradients(_autograd.linear(input, weight, **settings), input, weight, grad_output)
        exact = _gradients(F.linear(input, weight), input, weight, grad_output)
        pruned = reference.prune_nm_matmul(grad_output, weight.detach(), n, m)
        yield from _layer(f"{n}:{m}", backend, found, exact, pruned)


def _conv2d(backend: str, device: torch.device) -> Iterator[Comparison]:
    shapes = (4, 64, 16, 16), (64, 64, 3, 3), (4, 64, 16, 16)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        tensors = (torch.randn(shape).contiguous(memory_format=memory_format) for shape in shapes)
        input, weight, grad_output = _on(device, *tensors)
        for n, m in _patterns(backend, device):
            settings: Any = {"pattern": f"{n}:{m}", "method": "magnitude", "backend": backend}
            found = _gradients(_autograd.conv2d(input, weight, padding=1, **settings), input, weight, grad_output)
            exact = _gradients(F.conv2d(input, weight, padding=1), input, weight, grad_output)
            geometry = ((16, 16), (1, 1), (1, 1), (1, 1), 1, False)
            pruned = reference.conv2d_input_grad_nm(grad_output, weight.detach(), n, m, "magnitude", None, *geometry)
            yield from _layer(f"{n}:{m}, {memory_format}", backend, found, exact, pruned)


def _layer(what: str, backend: str, found: list[Tensor], exact: list[Tensor], pruned: Tensor) -> Iterator[Comparison]:
    """Compares output and weight gradient with the exact ones, and the data gradient with the pruned one.

    With the backend auto, the data gradient may also be exact.
    """
    rounding = _rounding(pruned.dtype)
    output, grad_input, grad_weight = found
    left_exact = backend == "auto" and _distance(grad_input, exact[1]) < _distance(grad_input, pruned)
    yield f"output, {what}", output, exact[0], 0.0
    yield f"data gradient, {what}", grad_input, exact[1] if left_exact else pruned, rounding
    yield f"weight gradient, {what}", grad_weight, exact[2], rounding


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm())


def _gradients(output: Tensor, input: Tensor, weight: Tensor, grad_output: Tensor) -> list[Tensor]:
    return [output.detach(), *torch.autograd.grad(output, (input, weight), grad_output)]


def _on(device: torch.device, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moves the tensors to the device, in a dtype that its sparse product supports.

    Returns:
        Input and weight, which require a gradient, and the output gradient.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    input, weight, grad_output = (tensor.to(device, dtype) for tensor in tensors)
    return input.requires_grad_(), weight.requires_grad_(), grad_output


def _patterns(backend: str, device: torch.device) -> list[tuple[int, int]]:
    if backend != "sparse" or device.type == "cpu":
        return list(PATTERNS)
    obstacles = {pattern: _semi_structured.obstacle(device, torch.float16, Pattern(*pattern)) for pattern in PATTERNS}
    if obstacles[PATTERNS[0]] is not None:
        raise Skipped(f"needs {obstacles[PATTERNS[0]]}")
    return [pattern for pattern, missing in obstacles.items() if missing is None]


def _rounding(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-10, torch.float32: 1e-4}.get(dtype, 1e-2)


def _need_kernel(op: str, device: torch.device) -> None:
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"sdgp::{op}", device.type.upper()):
        raise Skipped(f"needs a kernel for {device.type}, got none")


_TESTS: dict[str, Callable[[torch.device], Iterator[Comparison]]] = {
    "prune_nm": _prune_nm,
    "compress_nm": _compress_nm,
    "decompress_nm": _decompress_nm,
    "spmm_nm": _spmm_nm,
    **{f"linear, {backend}": partial(_linear, backend) for backend in BACKENDS},
    **{f"conv2d, {backend}": partial(_conv2d, backend) for backend in BACKENDS},
}
