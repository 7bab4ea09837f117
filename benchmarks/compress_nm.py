# SPDX-License-Identifier: BSD-3-Clause
"""Compares compress_nm with clone() of the same 16 MiB of float32.

Prints one line per tensor and pattern, with the time of each method as a multiple of the clone's time.

    python benchmarks/compress_nm.py --pattern 1:4 2:4
"""

from __future__ import annotations

from functools import partial
from itertools import islice

import prune_nm
import torch
from bench import Row, arguments, begin, finish
from torch import Tensor

import sdgp


def measure(name: str, x: Tensor, dim: int, pattern: str, rounds: int) -> Row:
    n, m = sdgp.Pattern.parse(pattern)
    calls = {method: partial(sdgp.compress_nm, x, n, m, dim, method) for method in prune_nm.METHODS}
    return prune_nm.measure(name, x, dim, pattern, calls, rounds)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--pattern", nargs="*", default=prune_nm.PATTERNS)
    args = begin(parser)
    common = islice(prune_nm.tensors(16, torch.float32), 4)
    rows = (measure(name, x, dim, pattern, args.rounds) for name, x, dim, _ in common for pattern in args.pattern)
    finish(args, "compress_nm", rows, lambda row: prune_nm.line({"mib": 16, **row}))


if __name__ == "__main__":
    main()
