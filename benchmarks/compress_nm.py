# SPDX-License-Identifier: BSD-3-Clause
"""Compares compress_nm with clone() of the same 16 MiB of float32.

Prints one line per tensor and pattern, with the time of each method as a multiple of the clone's time.

    python benchmarks/compress_nm.py --pattern 1:4 2:4
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any

import torch
from bench import arguments, begin, interleaved, store
from prune_nm import METHODS, PATTERNS, show, tensors
from torch import Tensor

import sdgp


def measure(name: str, x: Tensor, dim: int, pattern: str, rounds: int) -> dict[str, Any]:
    n, m = sdgp.Pattern.parse(pattern)
    candidates: dict[str, Callable[[], object]] = {"clone": x.clone}
    for method in METHODS:
        candidates[method] = partial(sdgp.compress_nm, x, n, m, dim, method)
    seconds = interleaved(candidates, rounds)
    clone = seconds.pop("clone")
    return {
        "tensor": name,
        "shape": list(x.shape),
        "dim": dim,
        "dtype": "float32",
        "pattern": pattern,
        "clone_ms": round(clone * 1e3, 4),
        "clone_gb_per_s": round(2 * x.nbytes / clone / 1e9, 2),
        "times_clone": {method: round(value / clone, 3) for method, value in seconds.items()},
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pattern", nargs="*", default=PATTERNS)
    args = parser.parse_args()
    machine = begin(args)
    rows = []
    for name, x, dim, _ in islice(tensors(16, torch.float32), 4):  # the common shapes
        for pattern in args.pattern:
            rows.append(measure(name, x, dim, pattern, args.rounds))
            show(16, rows[-1])
    if machine is not None:
        store("compress_nm", machine, rows, args.store)


if __name__ == "__main__":
    main()
