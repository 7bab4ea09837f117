# SPDX-License-Identifier: BSD-3-Clause
"""What bad input gets: each message, on the CPU, on the meta device and in inference mode."""

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
from sdgp import _load

X = torch.randn(4, 8)

OPS = {
    "prune_nm": sdgp.prune_nm,
    "_prune_nm_scale": torch.ops.sdgp._prune_nm_scale,
    "compress_nm": sdgp.compress_nm,
}

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
        expected = f"expected a tensor on a device with an sdgp kernel ({devices}), got {device}"
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


# Compressed tensors.

VALUES, INDICES = sdgp.compress_nm(torch.randn(3, 10), 2, 4)  # (3, 6)
PRODUCTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "decompress_nm": (sdgp.decompress_nm, {"values": VALUES, "indices": INDICES, "m": 4, "size": 10}),
    "spmm_nm": (sdgp.spmm_nm, {"values": VALUES, "indices": INDICES, "m": 4, "dense": torch.randn(10, 5)}),
}
EACH = tuple(PRODUCTS)
GROUPS = "expected the size of values to be ceil({} / {}) = {} groups times n, 1 <= n <= {}, got {}"

COMPRESSED: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (EACH, {"m": 0}, "expected 1 <= m <= 64, got 0"),
    (EACH, {"m": 65}, "expected 1 <= m <= 64, got 65"),
    (EACH[:2], {"m": 3}, GROUPS.format(10, 3, 4, 3, 6)),
    (EACH[:2], {"m": 1}, GROUPS.format(10, 1, 10, 1, 6)),
    (("decompress_nm",), {"size": 13}, GROUPS.format(13, 4, 4, 4, 6)),
    (("decompress_nm",), {"size": 0}, GROUPS.format(0, 4, 0, 4, 6)),
    (("decompress_nm",), {"size": 4}, GROUPS.format(4, 4, 1, 4, 6)),
    (("decompress_nm",), {"size": -1}, "expected size >= 0, got -1"),
    (("decompress_nm",), {"dim": 2}, "expected dim in [-2, 1], got 2"),
    (("decompress_nm",), {"dim": -3}, "expected dim in [-2, 1], got -3"),
    (
        EACH[:2],
        {"values": torch.tensor(1.0), "indices": torch.tensor(0, dtype=torch.uint8)},
        "expected at least 1 dimension, got a scalar",
    ),
    (("spmm_nm",), {"dense": torch.randn(13, 5)}, GROUPS.format(13, 4, 4, 4, 6)),
    (("spmm_nm",), {"dense": torch.randn(0, 5)}, GROUPS.format(0, 4, 0, 4, 6)),
    (("spmm_nm",), {"dense": torch.randn(10)}, "expected dense (size, cols), got (10,)"),
    (("spmm_nm",), {"dense": torch.randn(1, 10, 5)}, "expected dense (size, cols), got (1, 10, 5)"),
    (
        ("spmm_nm",),
        {"dense": torch.randn(10, 5).double()},
        "expected dense to be float32 as the values are, got float64",
    ),
    (EACH, {"indices": INDICES[:2]}, "expected values and indices of one shape, got {values} and (2, 6)"),
    (EACH, {"indices": INDICES[0]}, "expected values and indices of one shape, got {values} and (6,)"),
    (EACH, {"indices": INDICES.int()}, "expected indices to be uint8, got int32"),
    (EACH[:2], {"values": VALUES.int()}, "expected float32, float64, float16 or bfloat16, got int32"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize(
    ("op", "changed", "text"),
    [(op, changed, text) for ops, changed, text in COMPRESSED for op in ops],
    ids=[f"{op}: {text}" for ops, _, text in COMPRESSED for op in ops],
)
def test_compressed(op: str, changed: dict[str, Any], text: str, mode: Callable[[], Any], device: str) -> None:
    call, arguments = PRODUCTS[op]
    arguments = {**arguments, **changed}
    text = text.replace("{values}", str(tuple(arguments["values"].shape)))
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
    }
    with mode(), pytest.raises(RuntimeError, match=message(op, text)):
        call(**arguments)


OTHERS = [
    *((op, "indices", "indices") for op in EACH),
    ("spmm_nm", "dense", "dense"),
]


@pytest.mark.parametrize(("device", "other"), [("cpu", "meta"), ("meta", "cpu")])
@pytest.mark.parametrize(("op", "moved", "name"), OTHERS)
def test_compressed_on_two_devices(op: str, moved: str, name: str, device: str, other: str) -> None:
    call, arguments = PRODUCTS[op]
    places = {key: other if key == moved else device for key in arguments}
    arguments = {
        key: value.to(places[key]) if isinstance(value, torch.Tensor) else value for key, value in arguments.items()
    }
    with pytest.raises(RuntimeError, match=message(op, f"expected {name} on the same device ({device}), got {other}")):
        call(**arguments)


MATRIX = torch.randn(4, 8).half()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((MATRIX[0], 2, 4), "expected a matrix, got (8,)"),
        ((MATRIX.float(), 2, 4), "expected float16 or bfloat16, got float32"),
        ((MATRIX, 4, 8), "expected n <= 2 and m a multiple of 4, or 1:2, got 4:8"),
        ((MATRIX, 1, 6), "expected n <= 2 and m a multiple of 4, or 1:2, got 1:6"),
        ((MATRIX, 5, 4), "expected 1 <= n <= m <= 64, got n=5, m=4"),
        ((MATRIX, 2, 4, "best"), f'expected method to be one of {", ".join(sdgp.pattern.METHODS)}, got "best"'),
        (
            (MATRIX, 2, 4, "magnitude", None, "rows"),
            'expected layout to be cusparselt_sm80, cusparselt_sm90 or cutlass_sm80, got "rows"',
        ),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_pack_24(device: str, arguments: tuple[Any, ...], expected: str) -> None:
    input, *others = arguments
    with pytest.raises(RuntimeError, match=message("_pack_24", expected)):
        sdgp.ops.pack_24(input.to(device), *others)


def test_pack_24_on_a_device_without_a_kernel() -> None:
    expected = "expected a tensor on a device with an sdgp kernel (cuda, where sdgp was built for it), got cpu"
    with pytest.raises(RuntimeError, match=message("_pack_24", expected)):
        sdgp.ops.pack_24(MATRIX, 2, 4)


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "xpu", "privateuseone:0"])
def test_compressed_on_a_device_without_a_kernel(device: str) -> None:
    values, indices = _Elsewhere.on(device), _Elsewhere.on(device, torch.uint8)
    expected = f"expected a tensor on a device with an sdgp kernel (cpu), got {device}"
    with pytest.raises(RuntimeError, match=message("decompress_nm", expected)):
        sdgp.decompress_nm(values, indices, 4, 4)
    expected = f"expected indices on the same device (cpu), got {device}"
    with pytest.raises(RuntimeError, match=message("decompress_nm", expected)):
        sdgp.decompress_nm(torch.randn(1), indices, 4, 4)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in EACH for name, x in PRODUCTS[op][1].items() if isinstance(x, torch.Tensor)]
)
def test_compressed_layout(op: str, name: str) -> None:
    call, arguments = PRODUCTS[op]
    expected = "expected a strided tensor, got layout sparse_coo; call .to_dense() first"
    with pytest.raises(RuntimeError, match=message(op, expected)):
        call(**{**arguments, name: arguments[name].to_sparse()})


# Only the CPU sees what the indices are.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", [4, 5, 15, 16, 63, 64, 127, 128, 255])
@pytest.mark.parametrize("op", EACH)
def test_an_index_beyond_its_group(op: str, wrong: int, dtype: torch.dtype) -> None:
    call, arguments = PRODUCTS[op]
    arguments = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    expected = message(op, "expected every index below 4 and inside the size 10, got one that is not")
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
    expected = "expected every index below 4 and inside the size 10, got one that is not"
    with pytest.raises(RuntimeError, match=message(op, expected)):
        call(**{**arguments, "indices": indices})


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 2), (3, 7), (8, 32), (31, 64)])
@pytest.mark.parametrize("rows", [1, 70, 700])
def test_one_bad_index_among_many(rows: int, n: int, m: int) -> None:
    values, indices = sdgp.compress_nm(torch.randn(rows, 389), n, m)
    dense = torch.randn(389, 70)
    expected = f"expected every index below {m} and inside the size 389, got one that is not"
    for row, slot in ((0, 0), (rows - 1, values.shape[1] - 1), (rows // 2, values.shape[1] // 2)):
        corrupt = indices.clone()
        corrupt[row, slot] = m
        with pytest.raises(RuntimeError, match=message("spmm_nm", expected)):
            sdgp.spmm_nm(values, corrupt, m, dense)
        with pytest.raises(RuntimeError, match=message("decompress_nm", expected)):
            sdgp.decompress_nm(values, corrupt, m, 389)


# The data gradients of layers.

GRADIENTS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "_linear_input_grad_nm": (
        sdgp.ops.linear_input_grad_nm,
        {"grad_output": torch.randn(3, 8), "weight": torch.randn(8, 5), "n": 2, "m": 4, "method": "mvue"},
    ),
    "_conv2d_input_grad_nm": (
        sdgp.ops.conv2d_input_grad_nm,
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
}
BOTH = tuple(GRADIENTS)
LINEAR_OP, CONV_OP = ((op,) for op in BOTH)
ALONE = "expected a method that needs one group at a time, got rescale; prune by it, then call this by magnitude"

BAD_GRADIENTS: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (BOTH, {"n": 5}, "expected 1 <= n <= m <= 64, got n=5, m=4"),
    (BOTH, {"m": 65}, "expected 1 <= n <= m <= 64, got n=2, m=65"),
    (BOTH, {"method": "max"}, f'expected method to be one of {", ".join(sdgp.pattern.METHODS)}, got "max"'),
    (BOTH, {"method": "rescale"}, ALONE),
    (BOTH, {"seed": torch.zeros(2, dtype=torch.int64)}, "expected seed to have one element, got 2"),
    (LINEAR_OP, {"grad_output": torch.tensor(1.0)}, "expected at least 1 dimension, got a scalar"),
    (LINEAR_OP, {"grad_output": torch.randn(3, 9)}, "expected grad_output (..., 8), got (3, 9)"),
    (LINEAR_OP, {"grad_output": torch.ones(3, 8).int()}, "expected float32, float64, float16 or bfloat16, got int32"),
    (LINEAR_OP, {"weight": torch.randn(8)}, "expected weight (out, in), got (8,)"),
    (LINEAR_OP, {"weight": torch.randn(8, 5).half()}, "expected weight to be float32 as the gradient is, got float16"),
    (CONV_OP, {"grad_output": torch.randn(8, 5, 5)}, "expected grad_output (N, C, H, W), got (8, 5, 5)"),
    (CONV_OP, {"grad_output": torch.randn(2, 9, 5, 5)}, "expected grad_output (N, 8, H, W), got (2, 9, 5, 5)"),
    (CONV_OP, {"weight": torch.randn(8, 3)}, "expected weight (out, in / groups, kH, kW), got (8, 3)"),
    (
        CONV_OP,
        {"weight": torch.randn(8, 3, 3, 3).half()},
        "expected weight to be float32 as the gradient is, got float16",
    ),
    (CONV_OP, {"groups": 0}, "expected groups that divide 8 output channels, got 0"),
    (CONV_OP, {"groups": 3}, "expected groups that divide 8 output channels, got 3"),
    (CONV_OP, {"stride": (1,)}, "expected stride to be a pair, got 1 numbers"),
    (CONV_OP, {"stride": (0, 1)}, "expected stride >= 1, got 0"),
    (CONV_OP, {"stride": (1, -2)}, "expected stride >= 1, got -2"),
    (CONV_OP, {"dilation": (0, 1)}, "expected dilation >= 1, got 0"),
    (CONV_OP, {"padding": (0, -1)}, "expected padding >= 0, got -1"),
    (CONV_OP, {"padding": (0, 0, 0)}, "expected padding to be a pair, got 3 numbers"),
    (CONV_OP, {"input_size": (7, -7)}, "expected input_size >= 0, got -7"),
    (CONV_OP, {"input_size": (7,)}, "expected input_size to be a pair, got 1 numbers"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.inference_mode])
@pytest.mark.parametrize(
    ("op", "changed", "text"),
    [(op, changed, text) for ops, changed, text in BAD_GRADIENTS for op in ops],
    ids=[f"{op}: {text}" for ops, _, text in BAD_GRADIENTS for op in ops],
)
def test_gradients(op: str, changed: dict[str, Any], text: str, mode: Callable[[], Any], device: str) -> None:
    call, arguments = GRADIENTS[op]
    arguments = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in {**arguments, **changed}.items()
    }
    with mode(), pytest.raises(RuntimeError, match=message(op, text)):
        call(**arguments)


@pytest.mark.parametrize(("device", "other"), [("cpu", "meta"), ("meta", "cpu")])
@pytest.mark.parametrize("op", BOTH)
def test_gradients_on_two_devices(op: str, device: str, other: str) -> None:
    call, arguments = GRADIENTS[op]
    arguments = {
        **arguments,
        "grad_output": arguments["grad_output"].to(device),
        "weight": arguments["weight"].to(other),
    }
    expected = message(op, f"expected weight on the same device ({device}), got {other}")
    with pytest.raises(RuntimeError, match=expected):
        call(**{**arguments, "method": "magnitude"})


@pytest.mark.parametrize("op", BOTH)
def test_gradients_on_a_device_without_a_kernel(op: str) -> None:
    expected = "expected a tensor on a device with an sdgp kernel (cpu), got xpu"
    shape = (1,) * GRADIENTS[op][1]["weight"].ndim
    elsewhere, weight = _Elsewhere.on("xpu", shape=shape), _Elsewhere.on("xpu", shape=shape)
    call, arguments = GRADIENTS[op]
    arguments = {**arguments, "grad_output": elsewhere, "weight": weight, "n": 1, "m": 1, "method": "magnitude"}
    with pytest.raises(RuntimeError, match=message(op, expected)):
        call(**arguments)


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
    'backend="sparse" expected a device that has a sparse product (cpu, cuda), got meta; '
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


def test_a_library_of_another_python(tmp_path: Path) -> None:
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
