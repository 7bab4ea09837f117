# SPDX-License-Identifier: BSD-3-Clause
"""Tests the error messages of the products that compute gradients, and that fake tensors refuse wrong shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from errors import elsewhere, message

import sdgp
from sdgp import _ops
from sdgp._pattern import METHODS

# The gradients of layers.

GRADIENTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "matmul": (_ops.prune_nm_matmul, {"input": torch.randn(3, 8), "dense": torch.randn(8, 5), "n": 2, "m": 4}),
    "conv2d": (
        _ops.conv2d_input_grad_nm,
        {
            "grad_output": torch.randn(2, 8, 5, 5),
            "weight": torch.randn(8, 3, 3, 3),
            "n": 2,
            "m": 4,
            "method": "mvue",
            "seed": None,
            "input_size": (7, 7),
            "stride": (1, 1),
            "padding": (0, 0),
            "dilation": (1, 1),
            "groups": 1,
            "channels_last": False,
        },
    ),
    "weight": (
        _ops.conv2d_weight_grad_nm,
        {
            "grad_output": torch.randn(2, 8, 5, 5),
            "input": torch.randn(2, 6, 7, 7),
            "n": 2,
            "m": 4,
            "method": "mvue",
            "seed": None,
            "kernel_size": (3, 3),
            "stride": (1, 1),
            "padding": (0, 0),
            "dilation": (1, 1),
            "groups": 1,
            "channels_last": False,
        },
    ),
}
ALL = tuple(GRADIENTS)
MATMUL, CONV, WEIGHT = ((op,) for op in ALL)
CONVS = CONV + WEIGHT
NAMES = {"matmul": "_prune_nm_matmul", "conv2d": "_conv2d_input_grad_nm", "weight": "_conv2d_weight_grad_nm"}
OTHER = {"matmul": "dense", "conv2d": "weight", "weight": "input"}

BAD_GRADIENTS: list[tuple[tuple[str, ...], dict[str, Any], str, str]] = [
    (ALL, {"n": 5}, "1 <= n <= m <= 64", "n=5, m=4"),
    (ALL, {"m": 65}, "1 <= n <= m <= 64", "n=2, m=65"),
    (ALL, {"method": "max"}, ", ".join(METHODS), '"max"'),
    (ALL, {"method": "rescale"}, "one group at a time", "rescale; prune by it, then call this by magnitude"),
    (ALL, {"seed": torch.zeros(2, dtype=torch.int64)}, "seed to have one element", "2"),
    (MATMUL, {"input": torch.tensor(1.0)}, "1 dimension", "a scalar"),
    (MATMUL, {"input": torch.randn(3, 9)}, "input (..., 8)", "(3, 9)"),
    (MATMUL, {"input": torch.ones(3, 8).int()}, "float32, float64, float16 or bfloat16", "int32"),
    (MATMUL, {"dense": torch.randn(8)}, "dense (size, cols)", "(8,)"),
    (MATMUL, {"dense": torch.randn(8, 5).half()}, "dense to be float32", "float16"),
    (CONVS, {"grad_output": torch.randn(8, 5, 5)}, "grad_output (N, C, H, W)", "(8, 5, 5)"),
    (CONV, {"grad_output": torch.randn(2, 9, 5, 5)}, "(N, 8, H, W)", "(2, 9, 5, 5)"),
    (CONV, {"weight": torch.randn(8, 3)}, "(out, in / groups, kH, kW)", "(8, 3)"),
    (CONV, {"weight": torch.randn(8, 3, 3, 3).half()}, "weight to be float32", "float16"),
    (CONVS, {"groups": 0}, "groups that divide 8", "0"),
    (CONVS, {"groups": 3}, "groups that divide 8", "3"),
    (CONVS, {"stride": (1,)}, "stride to be a pair", "1 numbers"),
    (CONVS, {"stride": (0, 1)}, "stride >= 1", "0"),
    (CONVS, {"stride": (1, -2)}, "stride >= 1", "-2"),
    (CONVS, {"dilation": (0, 1)}, "dilation >= 1", "0"),
    (CONVS, {"padding": (0, -1)}, "padding >= 0", "-1"),
    (CONVS, {"padding": (0, 0, 0)}, "padding to be a pair", "3 numbers"),
    (CONV, {"input_size": (7, -7)}, "input_size >= 0", "-7"),
    (CONV, {"input_size": (7,)}, "input_size to be a pair", "1 numbers"),
    (WEIGHT, {"grad_output": torch.ones(2, 8, 5, 5).int()}, "float32, float64, float16 or bfloat16", "int32"),
    (WEIGHT, {"input": torch.randn(2, 6, 7, 7).half()}, "input to be float32", "float16"),
    (WEIGHT, {"input": torch.randn(6, 7, 7)}, "input (N, C, H, W)", "(6, 7, 7)"),
    (WEIGHT, {"input": torch.randn(3, 6, 7, 7)}, "input (2, C, H, W)", "(3, 6, 7, 7)"),
    (WEIGHT, {"groups": 4}, "groups that divide 6 input channels", "4"),
    (WEIGHT, {"kernel_size": (3,)}, "kernel_size to be a pair", "1 numbers"),
    (WEIGHT, {"kernel_size": (3, 0)}, "kernel_size >= 1", "0"),
    (WEIGHT, {"stride": (2, 1)}, "grad_output of size 3 in dimension 2", "(2, 8, 5, 5)"),
    (WEIGHT, {"padding": (0, 1)}, "grad_output of size 7 in dimension 3", "(2, 8, 5, 5)"),
    (WEIGHT, {"dilation": (4, 1)}, "grad_output of size 0 in dimension 2", "(2, 8, 5, 5)"),
    (WEIGHT, {"kernel_size": (3, 4)}, "grad_output of size 4 in dimension 3", "(2, 8, 5, 5)"),
]


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize(
    ("op", "changed", "requirement", "got"),
    [(op, *case) for ops, *case in BAD_GRADIENTS for op in ops],
    ids=[f"{op}: {requirement}, got {got}" for ops, _, requirement, got in BAD_GRADIENTS for op in ops],
)
def test_gradients(op: str, changed: dict[str, Any], requirement: str, got: str, mode: Callable[[], Any]) -> None:
    call, arguments = GRADIENTS[op]
    with mode(), pytest.raises(RuntimeError, match=message(NAMES[op], requirement, got)):
        call(**{**arguments, **changed})


@pytest.mark.parametrize("op", ALL)
def test_gradients_on_two_devices(op: str) -> None:
    call, arguments = GRADIENTS[op]
    other = OTHER[op]
    arguments = {**arguments, other: elsewhere(arguments[other]), "method": "magnitude"}
    with pytest.raises(RuntimeError, match=message(NAMES[op], "on the same device (cpu)", "xpu")):
        call(**arguments)


@pytest.mark.parametrize("op", ALL)
def test_gradients_on_a_device_without_a_kernel(op: str) -> None:
    call, arguments = GRADIENTS[op]
    moved = {name: elsewhere(value) for name, value in arguments.items() if isinstance(value, torch.Tensor)}
    with pytest.raises(RuntimeError, match=message(NAMES[op], "an sdgp kernel (cpu)", "xpu")):
        call(**{**arguments, **moved, "method": "magnitude"})


# Fake tensors must refuse shapes and dtypes that no result can have. The real ops write the messages.

BAD_SHAPES = {
    "compress_nm, n above m": lambda: sdgp.compress_nm(meta(3, 8), 5, 4),
    "prune_nm_matmul, m above 64": lambda: _ops.prune_nm_matmul(meta(3, 8), meta(8, 5), 2, 65),
    "conv2d_input_grad_nm, no value kept": lambda: on_meta("conv2d", n=0),
    "conv2d_weight_grad_nm, n above m": lambda: on_meta("weight", n=5),
    "compress_nm of a scalar": lambda: sdgp.compress_nm(meta(), 2, 4),
    "decompress_nm, indices of another shape": lambda: sdgp.decompress_nm(meta(3, 6), indices(2, 6), 4, 10),
    "spmm_nm, indices of another shape": lambda: sdgp.spmm_nm(meta(3, 6), indices(6), 4, meta(10, 5)),
    "spmm_nm, three dimensions": lambda: sdgp.spmm_nm(meta(3, 6), indices(3, 6), 4, meta(10, 5, 1)),
    "spmm_nm, indices of another dtype": lambda: sdgp.spmm_nm(meta(3, 6), indices(3, 6).long(), 4, meta(10, 5)),
    "spmm_nm, a vector": lambda: sdgp.spmm_nm(meta(3, 6), indices(3, 6), 4, meta(10)),
    "spmm_nm, another dtype": lambda: sdgp.spmm_nm(meta(3, 6), indices(3, 6), 4, meta(10, 5).double()),
    "prune_nm_matmul, another size": lambda: _ops.prune_nm_matmul(meta(3, 9), meta(8, 5), 2, 4),
    "prune_nm_matmul, three dimensions": lambda: _ops.prune_nm_matmul(meta(3, 8), meta(8, 5, 1), 2, 4),
    "prune_nm_matmul, a vector": lambda: _ops.prune_nm_matmul(meta(3, 8), meta(8), 2, 4),
    "prune_nm_matmul, another dtype": lambda: _ops.prune_nm_matmul(meta(3, 8), meta(8, 5).half(), 2, 4),
    "conv2d_input_grad_nm, another size": lambda: on_meta("conv2d", grad_output=meta(2, 9, 5, 5)),
    "conv2d_input_grad_nm, no image": lambda: on_meta("conv2d", grad_output=meta(8, 5, 5)),
    "conv2d_input_grad_nm, another dtype": lambda: on_meta("conv2d", weight=meta(8, 3, 3, 3).half()),
    "conv2d_weight_grad_nm, other samples": lambda: on_meta("weight", input=meta(3, 6, 7, 7)),
    "conv2d_weight_grad_nm, no image": lambda: on_meta("weight", grad_output=meta(8, 5, 5)),
    "conv2d_weight_grad_nm, another dtype": lambda: on_meta("weight", input=meta(2, 6, 7, 7).half()),
    "pack_24 of no matrix": lambda: _ops.pack_24(meta(8).half(), 2, 4),
}


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def indices(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.uint8, device="meta")


def on_meta(op: str, **changed: Any) -> torch.Tensor:
    call, arguments = GRADIENTS[op]
    arguments = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    result: torch.Tensor = call(**{**arguments, **changed})
    return result


@pytest.mark.parametrize("case", BAD_SHAPES)
def test_fakes_refuse_wrong_shapes_and_dtypes(case: str) -> None:
    with pytest.raises((RuntimeError, IndexError, ValueError)):
        BAD_SHAPES[case]()


@pytest.mark.parametrize("op", [sdgp.prune_nm, torch.ops.sdgp._prune_nm_scale], ids=["prune_nm", "scale"])
def test_prune_nm_of_a_meta_tensor_checks_what_shapes_and_dtypes_tell(op: Callable[..., torch.Tensor]) -> None:
    for shape, dim in (((), -1), ((4, 8), 2), ((4, 8), -3)):
        with pytest.raises((RuntimeError, IndexError)):
            op(meta(*shape), 2, 4, dim=dim)
    with pytest.raises(RuntimeError, match="int32"):
        op(meta(4, 8).int(), 2, 4)
