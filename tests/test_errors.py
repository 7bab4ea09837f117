# SPDX-License-Identifier: BSD-3-Clause
"""Tests the error messages of the ops on tensors and compressed tensors, for bad input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from errors import Elsewhere, elsewhere, message
from samples import DTYPES

import sdgp
from sdgp import _ops
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


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu", "mps", "xla:0", "hpu", "mtia", "lazy", "privateuseone:0"])
def test_prune_nm_on_a_device_without_a_kernel(device: str, op: str) -> None:
    if not (device.startswith("cuda") and torch._C._dispatch_has_kernel_for_dispatch_key(f"sdgp::{op}", "CUDA")):
        devices = "cpu" if op == "compress_nm" else "cpu, or cuda where sdgp was built for it"
        with pytest.raises(RuntimeError, match=message(op, f"an sdgp kernel ({devices})", device)):
            OPS[op](Elsewhere.on(device), 1, 2)
    with pytest.raises(RuntimeError, match=message(op, "seed on the input's device (cpu)", device)):
        OPS[op](X, 2, 4, method="mvue", seed=Elsewhere.on(device, torch.int64))


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


def test_compress_nm_of_a_method_without_a_fixed_number() -> None:
    requirement = "a method that keeps n values of each group"
    with pytest.raises(RuntimeError, match=message("compress_nm", requirement, "unstructured")):
        sdgp.compress_nm(X, 2, 4, method="unstructured")
    values, _ = sdgp.compress_nm(X, 4, 4, method="unstructured")
    assert torch.equal(values, X)


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
    values, indices = Elsewhere.on(device), Elsewhere.on(device, torch.uint8)
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
