# SPDX-License-Identifier: BSD-3-Clause
"""Tests the error messages for bad input on the CPU, on the meta device and in inference mode."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import DTYPES
from torch import nn

import sdgp
from sdgp import _load, _ops
from sdgp._pattern import METHODS

X = torch.randn(4, 8)

OPS = {
    "prune_nm": sdgp.prune_nm,
    "_prune_nm_scale": torch.ops.sdgp._prune_nm_scale,
    "compress_nm": sdgp.compress_nm,
}

PRUNE_NM: list[tuple[str, Callable[[Any, torch.Tensor], Any], str, str]] = [
    ("n > m", lambda op, x: op(x, 5, 4), "1 <= n <= m <= 64", "n=5, m=4"),
    ("n < 1", lambda op, x: op(x, 0, 4), "1 <= n <= m <= 64", "n=0, m=4"),
    ("m > 64", lambda op, x: op(x, 2, 65), "1 <= n <= m <= 64", "n=2, m=65"),
    ("n = m > 64", lambda op, x: op(x, 65, 65), "1 <= n <= m <= 64", "n=65, m=65"),
    ("dim", lambda op, x: op(x, 2, 4, dim=2), "dim in [-2, 1]", "2"),
    ("negative dim", lambda op, x: op(x, 2, 4, dim=-3), "dim in [-2, 1]", "-3"),
    ("scalar", lambda op, x: op(x[0, 0], 2, 4), "1 dimension", "a scalar"),
    ("method", lambda op, x: op(x, 2, 4, method="max"), "magnitude, random", '"max"'),
    (
        "seed's dtype",
        lambda op, x: op(x, 2, 4, method="mvue", seed=torch.zeros(1, dtype=torch.int32, device=x.device)),
        "seed to be int64",
        "int32",
    ),
    (
        "seed's size",
        lambda op, x: op(x, 2, 4, seed=torch.zeros(2, dtype=torch.int64, device=x.device)),
        "seed to have one element",
        "2",
    ),
]


def message(op: str, requirement: str, got: str) -> str:
    """Returns the pattern of an op's error: the op's name, the important words of what it expected, and what it got."""
    return f"^{op}: expected .*{re.escape(requirement)}.*, got {re.escape(got)}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize(
    ("call", "requirement", "got"), [case[1:] for case in PRUNE_NM], ids=[case[0] for case in PRUNE_NM]
)
def test_prune_nm(
    call: Callable[[Any, torch.Tensor], Any], requirement: str, got: str, mode: Callable[[], Any], op: str
) -> None:
    with mode(), pytest.raises(RuntimeError, match=message(op, requirement, got)):
        call(OPS[op], X)


QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
OTHER_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)} - {*DTYPES}, key=str)


@pytest.mark.filterwarnings("ignore:.*(support is experimental|quantize)")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_prune_nm_dtype(dtype: torch.dtype, op: str) -> None:
    expected = message(op, "float32, float64, float16 or bfloat16", str(dtype).removeprefix("torch."))
    with pytest.raises(RuntimeError, match=expected):
        OPS[op](torch.empty(4, 8, dtype=dtype), 2, 4)


@pytest.mark.filterwarnings("ignore:.*quantize")
def test_prune_nm_quantized_seed() -> None:
    seed = torch.quantize_per_tensor(X[:1, 0], 0.1, 0, torch.quint8)
    with pytest.raises(RuntimeError, match=message("prune_nm", "seed to be int64", "quint8")):
        sdgp.prune_nm(X, 2, 4, method="mvue", seed=seed)


class _Elsewhere(torch.Tensor):
    """A tensor without data that claims to be on a device that this torch may lack."""

    @staticmethod
    def on(device: str, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (1,)) -> torch.Tensor:
        return torch.Tensor._make_wrapper_subclass(_Elsewhere, shape, device=device, dtype=dtype)  # type: ignore[attr-defined]

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
    if not (device.startswith("cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(f"sdgp::{op}", "CUDA")):
        devices = "cpu" if op == "compress_nm" else "cpu, or cuda where sdgp was built for it"
        with pytest.raises(RuntimeError, match=message(op, f"an sdgp kernel ({devices})", device)):
            OPS[op](_Elsewhere.on(device), 1, 2)
    with pytest.raises(RuntimeError, match=message(op, "seed on the input's device (cpu)", device)):
        OPS[op](X, 2, 4, method="mvue", seed=_Elsewhere.on(device, torch.int64))


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
    for op, call in OPS.items():
        with pytest.raises(RuntimeError, match=message(op, "strided", f"layout {layout}; call .to_dense() first")):
            call(make(), 2, 4)


# Compressed tensors.

VALUES, INDICES = sdgp.compress_nm(torch.randn(3, 10), 2, 4)  # (3, 6)
PRODUCTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "decompress_nm": (sdgp.decompress_nm, {"values": VALUES, "indices": INDICES, "m": 4, "size": 10}),
    "spmm_nm": (sdgp.spmm_nm, {"values": VALUES, "indices": INDICES, "m": 4, "dense": torch.randn(10, 5)}),
}
EACH = tuple(PRODUCTS)


def groups(size: int, m: int) -> str:
    return f"ceil({size} / {m}) = {-(-size // m)} groups"


COMPRESSED: list[tuple[tuple[str, ...], dict[str, Any], str, str]] = [
    (EACH, {"m": 0}, "1 <= m <= 64", "0"),
    (EACH, {"m": 65}, "1 <= m <= 64", "65"),
    (EACH, {"m": 3}, groups(10, 3), "6"),
    (EACH, {"m": 1}, groups(10, 1), "6"),
    (("decompress_nm",), {"size": 13}, groups(13, 4), "6"),
    (("decompress_nm",), {"size": 0}, groups(0, 4), "6"),
    (("decompress_nm",), {"size": 4}, groups(4, 4), "6"),
    (("decompress_nm",), {"size": -1}, "size >= 0", "-1"),
    (("decompress_nm",), {"dim": 2}, "dim in [-2, 1]", "2"),
    (("decompress_nm",), {"dim": -3}, "dim in [-2, 1]", "-3"),
    (EACH, {"values": torch.tensor(1.0), "indices": torch.tensor(0, dtype=torch.uint8)}, "1 dimension", "a scalar"),
    (("spmm_nm",), {"dense": torch.randn(13, 5)}, groups(13, 4), "6"),
    (("spmm_nm",), {"dense": torch.randn(0, 5)}, groups(0, 4), "6"),
    (("spmm_nm",), {"dense": torch.randn(10)}, "dense (size, cols)", "(10,)"),
    (("spmm_nm",), {"dense": torch.randn(1, 10, 5)}, "dense (size, cols)", "(1, 10, 5)"),
    (("spmm_nm",), {"dense": torch.randn(10, 5).double()}, "dense to be float32", "float64"),
    (EACH, {"indices": INDICES[:2]}, "indices", "{values} and (2, 6)"),
    (EACH, {"indices": INDICES[0]}, "indices", "{values} and (6,)"),
    (EACH, {"indices": INDICES.int()}, "indices to be uint8", "int32"),
    (EACH, {"values": VALUES.int()}, "float32, float64, float16 or bfloat16", "int32"),
]


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize(
    ("op", "changed", "requirement", "got"),
    [(op, *case) for ops, *case in COMPRESSED for op in ops],
    ids=[f"{op}: {requirement}, got {got}" for ops, _, requirement, got in COMPRESSED for op in ops],
)
def test_compressed(op: str, changed: dict[str, Any], requirement: str, got: str, mode: Callable[[], Any]) -> None:
    call, arguments = PRODUCTS[op]
    arguments = {**arguments, **changed}
    got = got.replace("{values}", str(tuple(arguments["values"].shape)))
    with mode(), pytest.raises(RuntimeError, match=message(op, requirement, got)):
        call(**arguments)


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    return _Elsewhere.on("xpu", x.dtype, tuple(x.shape))


OTHERS = [
    *((op, "indices") for op in EACH),
    ("spmm_nm", "dense"),
]


@pytest.mark.parametrize(("op", "moved"), OTHERS)
def test_compressed_on_two_devices(op: str, moved: str) -> None:
    call, arguments = PRODUCTS[op]
    arguments = {**arguments, moved: elsewhere(arguments[moved])}
    with pytest.raises(RuntimeError, match=message(op, f"{moved} on the same device (cpu)", "xpu")):
        call(**arguments)


MATRIX = torch.randn(4, 8).half()


@pytest.mark.parametrize(
    ("arguments", "requirement", "got"),
    [
        ((MATRIX[0], 2, 4), "a matrix", "(8,)"),
        ((MATRIX.float(), 2, 4), "float16 or bfloat16", "float32"),
        ((MATRIX, 4, 8), "n <= 2 and m a multiple of 4, or 1:2", "4:8"),
        ((MATRIX, 1, 6), "n <= 2 and m a multiple of 4, or 1:2", "1:6"),
        ((MATRIX, 5, 4), "1 <= n <= m <= 64", "n=5, m=4"),
        ((MATRIX, 2, 4, "best"), ", ".join(METHODS), '"best"'),
        ((MATRIX, 2, 4, "magnitude", None, "rows"), "cusparselt_sm80, cusparselt_sm90 or cutlass_sm80", '"rows"'),
    ],
)
def test_pack_24(arguments: tuple[Any, ...], requirement: str, got: str) -> None:
    with pytest.raises(RuntimeError, match=message("_pack_24", requirement, got)):
        _ops.pack_24(*arguments)


def test_pack_24_on_a_device_without_a_kernel() -> None:
    with pytest.raises(RuntimeError, match=message("_pack_24", "an sdgp kernel (cuda", "cpu")):
        _ops.pack_24(MATRIX, 2, 4)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu", "privateuseone:0"])
def test_compressed_on_a_device_without_a_kernel(device: str) -> None:
    values, indices = _Elsewhere.on(device), _Elsewhere.on(device, torch.uint8)
    with pytest.raises(RuntimeError, match=message("decompress_nm", "an sdgp kernel (cpu)", device)):
        sdgp.decompress_nm(values, indices, 4, 4)
    with pytest.raises(RuntimeError, match=message("decompress_nm", "indices on the same device (cpu)", device)):
        sdgp.decompress_nm(torch.randn(1), indices, 4, 4)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in EACH for name, x in PRODUCTS[op][1].items() if isinstance(x, torch.Tensor)]
)
def test_compressed_layout(op: str, name: str) -> None:
    call, arguments = PRODUCTS[op]
    with pytest.raises(RuntimeError, match=message(op, "strided", "layout sparse_coo; call .to_dense() first")):
        call(**{**arguments, name: arguments[name].to_sparse()})


# Only the CPU checks the values of the indices.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [4, 5, 15, 16, 63, 64, 127, 128, 255])
@pytest.mark.parametrize("op", EACH)
def test_an_index_beyond_its_group(op: str, wrong: int, dtype: torch.dtype) -> None:
    call, arguments = PRODUCTS[op]
    arguments = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    expected = message(op, "index below 4 and inside the size 10", "a larger one")
    for at in (0, arguments["indices"].numel() // 2, arguments["indices"].numel() - 1):
        indices = arguments["indices"].clone(memory_format=torch.preserve_format)
        indices.movedim(1, -1).view(-1)[at] = wrong
        with pytest.raises(RuntimeError, match=expected):
            call(**{**arguments, "indices": indices})


@pytest.mark.parametrize("op", EACH[:2])
def test_an_index_beyond_the_tail(op: str) -> None:
    call, arguments = PRODUCTS[op]  # 10 = 4 + 4 + 2: the last group has no index 2
    indices = INDICES.clone()
    indices[1, 5] = 2
    with pytest.raises(RuntimeError, match=message(op, "index below 4 and inside the size 10", "a larger one")):
        call(**{**arguments, "indices": indices})


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 7), (8, 32), (31, 64)])
@pytest.mark.parametrize("rows", [1, 70, 700])
def test_one_bad_index_among_many(rows: int, n: int, m: int) -> None:
    values, indices = sdgp.compress_nm(torch.randn(rows, 389), n, m)
    dense = torch.randn(389, 70)
    expected = f"index below {m} and inside the size 389", "a larger one"
    for row, slot in ((0, 0), (rows - 1, values.shape[1] - 1), (rows // 2, values.shape[1] // 2)):
        corrupt = indices.clone()
        corrupt[row, slot] = m
        with pytest.raises(RuntimeError, match=message("spmm_nm", *expected)):
            sdgp.spmm_nm(values, corrupt, m, dense)
        with pytest.raises(RuntimeError, match=message("decompress_nm", *expected)):
            sdgp.decompress_nm(values, corrupt, m, 389)


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


@pytest.mark.parametrize("op", ["prune_nm", "_prune_nm_scale"])
def test_prune_nm_of_a_meta_tensor_checks_what_shapes_and_dtypes_tell(op: str) -> None:
    for shape, dim in (((), -1), ((4, 8), 2), ((4, 8), -3)):
        with pytest.raises((RuntimeError, IndexError)):
            OPS[op](meta(*shape), 2, 4, dim=dim)
    with pytest.raises(RuntimeError, match="int32"):
        OPS[op](meta(4, 8).int(), 2, 4)


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
    (lambda: sdgp.Linear.from_dense(nn.Conv2d(4, 8, 3)), "from_dense", "torch.nn.modules.linear.Linear", "Conv2d"),
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


def test_a_refused_conversion_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"^convert: expected filter"):
        sdgp.convert(model, filter=lambda module, name: name == "0" or None)  # type: ignore[arg-type,return-value]
    assert all(type(layer) is nn.Linear for layer in model)


# A broken installation.


def import_under(tmp_path: Path, files: dict[str, str], **environment: str) -> str:
    """Returns the last line of stderr of `import sdgp`, with some modules replaced."""
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


def test_a_library_of_another_python(tmp_path: Path) -> None:
    if any("editable" in type(finder).__module__ for finder in sys.meta_path):
        pytest.skip("an editable installation is found before any other")
    package = tmp_path / "sdgp"
    shutil.copytree(Path(sdgp.__file__).parent, package, ignore=shutil.ignore_patterns("_C.*.so", "lib"))
    (package / "_C.cpython-39-aarch64-linux-gnu.so").touch()
    last = import_under(tmp_path, {})
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    assert last == (
        f"ImportError: sdgp was built for another Python or platform: this one loads _C{suffix}, "
        "found _C.cpython-39-aarch64-linux-gnu.so: reinstall sdgp with this Python's pip"
    )


@pytest.mark.parametrize("driver", [0, 13000, 13020, 14000])
def test_a_driver_that_runs_the_cuda_library(driver: int) -> None:
    _load.check_driver(13010, driver, "torch 2.14.1+cu130")


def test_an_older_driver() -> None:
    message = (
        r"^sdgp's CUDA library was built with CUDA 13\.1 and needs a driver for CUDA 13\.0 or newer, "
        r"found torch 2\.10\.0\+cu128 on a driver for CUDA 12\.8: update the driver, build sdgp with its CUDA, "
    )
    with pytest.raises(ImportError, match=message):
        _load.check_driver(13010, 12080, "torch 2.10.0+cu128")


def test_unknown_instruction_set(tmp_path: Path) -> None:
    last = import_under(tmp_path, {}, SDGP_FORCE_ISA="sse9")
    assert re.fullmatch(
        r"RuntimeError: SDGP_FORCE_ISA: expected an instruction set that this CPU runs \((.*, )?baseline\), got sse9",
        last,
    )
