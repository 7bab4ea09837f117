# SPDX-License-Identifier: BSD-3-Clause
"""Compares prune_nm or compress_nm with clone() of the same tensor, and with the PyTorch composition that it replaces.

Prints one line per tensor and pattern, with the time of every method as a multiple of the clone's time. ``topk`` is the
composition abs + topk + gather + scatter for magnitude. After the common shapes come shapes without a fast path.

    python benchmarks/prune_nm.py                      # everything, ten minutes or so
    python benchmarks/prune_nm.py --mib 16 --dtype float32 --pattern 2:4
    python benchmarks/prune_nm.py --op compress_nm --mib 16 --dtype float32
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from bench import Row, arguments, begin, count, finish, interleaved
from torch import Tensor

import sdgp
from sdgp._pattern import METHODS

PATTERNS = ("2:4", "1:4", "1:8", "2:8", "4:8", "2:16", "4:16", "8:16", "4:32", "8:32", "16:32")
DTYPES = ("float32", "bfloat16", "float16")

# 16 MiB of float32 without a fast path: maps smaller than a vector, groups whose size is not a power of two, samples
# with few values, and groups along the first dimension, where rescale sums over columns.
OTHERS = (
    ("NCHW 3x3", (1820, 256, 3, 3), 1, ("2:4", "4:16")),
    ("NCHW 4x4", (1024, 256, 4, 4), 1, ("2:4", "4:16")),
    ("(rows, 960)", (4369, 960), -1, ("3:6", "5:10")),
    ("(N, 8, 2)", (262144, 8, 2), 1, ("2:4", "4:8")),
    ("(C, columns)", (1024, 4096), 0, ("2:4", "4:16")),
)


def tensors(mib: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor, int, tuple[str, ...]]]:
    """Yields (name, tensor, dim, patterns). Each tensor has as many elements as `mib` MiB of float32."""
    rows = mib * 2**18 // 1024
    yield "(rows, C)", torch.randn(rows, 1024).to(dtype), -1, PATTERNS
    yield "(N, T, C)", torch.randn(max(1, rows // 256), 256, 1024).to(dtype), -1, PATTERNS
    maps = torch.randn(max(1, rows // 64), 64, 32, 32).to(dtype)
    yield "NCHW", maps, 1, PATTERNS
    yield "NHWC", maps.to(memory_format=torch.channels_last), 1, PATTERNS
    if mib == 16:
        for name, shape, dim, patterns in OTHERS:
            yield name, torch.randn(shape).to(dtype), dim, patterns


def composition(x: Tensor, n: int, m: int, dim: int) -> Tensor:
    groups = x.movedim(dim, -1).unflatten(-1, (-1, m))
    kept = groups.abs().topk(n, dim=-1).indices
    pruned = torch.zeros_like(groups).scatter(-1, kept, groups.gather(-1, kept))
    return pruned.flatten(-2).movedim(-1, dim)


def measure(
    name: str, x: Tensor, dim: int, pattern: str, candidates: Mapping[str, Callable[[], object]], rounds: int
) -> Row:
    """Returns the row of one tensor: the time of each candidate as a multiple of the clone's time."""
    seconds = interleaved({"clone": x.clone, **candidates}, rounds)
    clone = seconds.pop("clone")
    times = {candidate: value / clone for candidate, value in seconds.items()}
    if "topk" in times:
        times["topk / magnitude"] = times["topk"] / times["magnitude"]
    return {
        "tensor": name,
        "shape": list(x.shape),
        "dim": dim,
        "dtype": str(x.dtype).removeprefix("torch."),
        "pattern": pattern,
        "clone_ms": round(clone * 1e3, 4),
        "clone_gb_per_s": round(2 * x.nbytes / clone / 1e9, 2),
        "times_clone": {candidate: round(value, 3) for candidate, value in times.items()},
    }


def rows(args: argparse.Namespace) -> Iterator[Row]:
    op = getattr(sdgp, args.op)
    methods = [method for method in METHODS if args.op == "prune_nm" or method != "unstructured"]
    for mib in args.mib:
        for dtype in args.dtype:
            for name, x, dim, patterns in tensors(mib, getattr(torch, dtype)):
                against_topk = (args.op, mib, dtype) == ("prune_nm", 16, "float32") and name in ("(rows, C)", "NCHW")
                for pattern in patterns:
                    if args.pattern is not None and pattern not in args.pattern:
                        continue
                    n, m = sdgp.Pattern.parse(pattern)
                    calls = {method: partial(op, x, n, m, dim, method) for method in methods}
                    if against_topk:
                        calls["topk"] = partial(composition, x, n, m, dim)
                    row = measure(name, x, dim, pattern, calls, args.rounds)
                    yield {"mib": mib, **row}


def line(row: Row) -> str:
    times = "  ".join(f"{method} {value:5.2f}x" for method, value in row["times_clone"].items())
    head = f"{row['tensor']:12s} | {row['mib']:2d} MiB of float32 as {row['dtype']:8s} | {row['pattern']:>5s}"
    return f"{head} | clone {row['clone_ms']:6.2f} ms {row['clone_gb_per_s']:5.1f} GB/s | {times}"


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--op", choices=("prune_nm", "compress_nm"), default="prune_nm")
    parser.add_argument("--mib", type=count, nargs="*", default=[16, 1, 64])
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=DTYPES)
    parser.add_argument("--pattern", nargs="*", help="only these (default: all)")
    args = begin(parser)
    finish(args, args.op, rows(args), line)


if __name__ == "__main__":
    main()
