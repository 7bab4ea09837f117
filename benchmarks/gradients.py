# SPDX-License-Identifier: BSD-3-Clause
"""Compares the sparse products of layers with PyTorch's exact ones: data and weight gradients.

The subjects: spmm_nm, the data gradients of linear layers; conv2d, those of channels_last convolutions; weight_grad,
the weight gradients of both. Prints one line per shape (rows, in -> out, or kernel, batch, in -> out, pixels of the
input) and pattern: the time of the exact product; for each method, the time of the sparse one and its speed as a
multiple of the exact one's; the time of a clone() of the output gradient; and the sparse product's roofline bound.

    python benchmarks/gradients.py                              # everything, half an hour or so
    python benchmarks/gradients.py --subject conv2d --shape 1x1 --pattern 2:4 4:32

The bound is the longer of two times: the remaining arithmetic at the rate of the fastest dense product, and the
necessary memory traffic (output gradient, other operand, result) at the bandwidth of the fastest clone. It ignores the
time for choosing values, packing, and fresh pages.

The sparse time includes all work of a layer's backward: it packs the other operand, prunes and multiplies. The system
allocates fresh pages for tensors above about 32 MiB in every call, exact or sparse. The page faults may take longer
than the product. With THP_MEM_ALLOC_ENABLE=1 PyTorch asks for huge pages, which removes nearly all of this time.

SDGP_FORCE_ISA=avx2 does not limit the exact product, which still uses AVX-512 if the CPU has it. These variables limit
MKL and oneDNN too: MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from bench import Row, arguments, begin, finish, median_and_interval, rounds_of, subject_here
from torch import Tensor, nn

import sdgp
from sdgp._decision import Products
from sdgp._pattern import Pruning

SUBJECTS = ("spmm_nm", "conv2d", "weight_grad")
# By density: 1/2, 1/4, 1/8. The saved arithmetic limits the speed to 2, 4 and 8 times that of exact.
PATTERNS = ("2:4", "8:16", "16:32", "1:4", "4:16", "1:8", "4:32")
METHODS = ("magnitude", "mvue", "rescale")

LINEAR = ((4096, 768, 3072), (4096, 3072, 768), (2048, 1024, 4096))  # rows, in, out


class Convolution(NamedTuple):
    kernel: int
    batch: int
    channels_in: int
    channels_out: int
    size: int  # height and width of the input
    stride: int = 1

    def __str__(self) -> str:
        kernel, batch, channels_in, channels_out, size, stride = self
        text = f"{kernel}x{kernel} {batch}, {channels_in} -> {channels_out}, {size}x{size}"
        return text if stride == 1 else f"{text} / {stride}"


CONVOLUTIONS = (
    Convolution(3, 64, 64, 64, 32),
    Convolution(3, 64, 128, 128, 16),
    Convolution(3, 64, 256, 256, 8),
    Convolution(3, 64, 128, 256, 16, stride=2),
    Convolution(1, 32, 256, 64, 56),
    Convolution(1, 32, 64, 256, 56),
    Convolution(1, 32, 1024, 256, 14),
    Convolution(1, 24, 512, 128, 28),
)


class Case(NamedTuple):
    """One data or weight gradient, as the product of the output gradient and ``operand``."""

    name: str
    grad_output: Tensor
    operand: Tensor
    result_bytes: int
    flop: int  # for the exact product
    products: Products


def layers(subject: str) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Yields the name, the layer and the input."""
    if subject != "conv2d":
        for rows, features_in, features_out in LINEAR:
            layer = nn.Linear(features_in, features_out, bias=False)
            yield f"linear {rows}, {features_in} -> {features_out}", layer, torch.randn(rows, features_in)
    if subject != "spmm_nm":
        for shape in CONVOLUTIONS:
            kernel, batch, channels_in, channels_out, size, stride = shape
            convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, bias=False)
            images = torch.randn(batch, channels_in, size, size)
            yield str(shape), convolution, images.to(memory_format=torch.channels_last)


def cases(subject: str, shape: str, dtype: torch.dtype) -> Iterator[Case]:
    """Yields one case at a time, because all would not fit in memory."""
    for name, plain, images in layers(subject):
        if shape not in name:
            continue
        input, weight_grad = images.to(dtype), subject == "weight_grad"
        layer: Any = sdgp.convert(
            plain.to(dtype, memory_format=torch.channels_last),  # type: ignore[call-overload]
            backend="sparse",
            weight_grad="8:16" if weight_grad else None,
        )
        with torch.no_grad():
            grad = torch.randn_like(layer(input))
        yield Case(
            name=name,
            grad_output=grad,
            operand=input if weight_grad else layer.weight,
            result_bytes=(layer.weight if weight_grad else input).nbytes,
            flop=2 * grad.numel() * layer.weight[0].numel(),
            products=layer.weight_products(grad, input) if weight_grad else layer.products(grad, input),
        )


def measure(case: Case, pattern: str, rounds: int, machine: Row) -> Row:
    candidates: dict[str, Callable[[], object]] = {"clone": case.grad_output.clone}
    for method in METHODS:
        products = replace(case.products, pruning=Pruning.parse("benchmark", pattern, method, "sparse"))
        candidates["exact"] = products.exact
        candidates[method] = products.sparse
    times = rounds_of(candidates, rounds)
    milliseconds = {name: 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    # Use the ratios within each round, because a slow phase of the machine affects both times.
    ratios = {
        method: median_and_interval(exact / sparse for exact, sparse in zip(times["exact"], times[method], strict=True))
        for method in METHODS
    }
    return {
        "shape": case.name,
        "pattern": pattern,
        "gflop": case.flop / 1e9,
        "bound_ms": round(bound_ms(case, pattern, machine), 3),
        "clone_ms": round(milliseconds["clone"], 3),
        "exact_ms": round(milliseconds["exact"], 3),
        "sparse_ms": {method: round(milliseconds[method], 3) for method in METHODS},
        "times_exact": {method: round(median, 3) for method, (median, _, _) in ratios.items()},
        "interval": {method: [round(low, 3), round(high, 3)] for method, (_, low, high) in ratios.items()},
    }


def bound_ms(case: Case, pattern: str, machine: Row) -> float:
    n, m = sdgp.Pattern.parse(pattern)
    arithmetic = case.flop * n / m / machine["best_dense_product_gflop_per_s"]
    moved = case.grad_output.nbytes + case.operand.nbytes + case.result_bytes
    return float(max(arithmetic, moved / machine["best_clone_gb_per_s"]) / 1e6)


def line(row: Row) -> str:
    exact = f"exact {row['exact_ms']:7.2f} ms {row['gflop'] / row['exact_ms'] * 1e3:5.1f} GFLOP/s"
    sparse = " | ".join(
        f"{method} {row['sparse_ms'][method]:7.2f} ms {row['times_exact'][method]:5.2f}x [{low:.2f}, {high:.2f}]"
        for method, (low, high) in row["interval"].items()
    )
    head = f"{row['shape']:29s} | {row['pattern']:>5s}"
    return f"{head} | {exact} | {sparse} | clone {row['clone_ms']:6.2f} ms | bound {row['bound_ms']:6.2f} ms"


def speeds(dtype: torch.dtype) -> dict[str, float]:
    """Measures PyTorch's fastest dense product and fastest clone on this machine, for a roofline."""
    flops = []
    for size in (512, 1024, 2048):
        a, b = torch.randn(2, size, size, dtype=dtype)
        flops.append(2 * size**3 / _best(partial(torch.mm, a, b)))
    x = torch.randn(2**22)  # 16 MiB: above about 32 MiB, each call waits for fresh pages from the system
    return {
        "best_dense_product_gflop_per_s": round(max(flops) / 1e9, 1),
        "best_clone_gb_per_s": round(2 * x.nbytes / _best(x.clone) / 1e9, 1),
    }


def _best(call: Callable[[], object], seconds: float = 1.0) -> float:
    """Repeats a call for ``seconds``, and returns the shortest time of one call in seconds."""
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        call()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--subject", nargs="*", choices=SUBJECTS, default=SUBJECTS)
    parser.add_argument("--shape", default="", help="only those whose name contains this")
    parser.add_argument("--pattern", nargs="*", default=PATTERNS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = begin(parser)
    dtype = getattr(torch, args.dtype)
    args.machine |= speeds(dtype)
    product, clone = args.machine["best_dense_product_gflop_per_s"], args.machine["best_clone_gb_per_s"]
    print(f"best dense product {product} GFLOP/s, best clone {clone} GB/s, {args.threads} thread(s)", flush=True)
    for subject in args.subject:
        rows = (
            measure(case, pattern, args.rounds, args.machine)
            for case in cases(subject, args.shape, dtype)
            for pattern in args.pattern
        )
        finish(args, subject_here(subject if args.dtype == "float32" else f"{subject}, {args.dtype}"), rows, line)


if __name__ == "__main__":
    main()
