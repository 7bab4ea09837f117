# SPDX-License-Identifier: BSD-3-Clause
"""Compares the stored results of gradients.py with their roofline bounds.

Prints Markdown. The bound is the longer of two times: the remaining arithmetic at the rate of the fastest dense
product, and the necessary memory traffic at the bandwidth of the fastest clone. The traffic is the output gradient, the
other operand and the result. The bound ignores the time for choosing values, packing, and fresh pages.

    python benchmarks/roofline.py benchmarks/results/NAME.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import sdgp

HEAD = ("shape", "N:M", "arithmetic", "memory", "measured", "of the bound", "x exact", "at the bound")


def bounds(row: dict[str, Any], machine: dict[str, Any]) -> tuple[float, float]:
    """Returns the bounds (arithmetic, memory) in milliseconds."""
    n, m = sdgp.Pattern.parse(row["pattern"])
    moved = row["gradient_bytes"] + row["operand_bytes"] + row["result_bytes"]
    arithmetic = row["gflop"] * n / m / machine["best_dense_product_gflop_per_s"] * 1e3
    return arithmetic, moved / machine["best_clone_gb_per_s"] / 1e6


def cells(row: dict[str, Any], machine: dict[str, Any], method: str) -> tuple[str, ...]:
    arithmetic, memory = bounds(row, machine)
    bound, measured = max(arithmetic, memory), row["sparse_ms"][method]
    return (
        row["shape"],
        row["pattern"],
        f"{arithmetic:.1f} ms",
        f"{memory:.1f} ms",
        f"{measured:.1f} ms",
        f"{bound / measured:.0%}",
        f"{row['times_exact'][method]:.2f}",
        f"{row['exact_ms'] / bound:.2f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--method", default="mvue")
    args = parser.parse_args()
    for subject, result in json.loads(args.results.read_text(encoding="utf-8")).items():
        machine = result["machine"]
        if "best_dense_product_gflop_per_s" not in machine:
            continue
        product, clone = machine["best_dense_product_gflop_per_s"], machine["best_clone_gb_per_s"]
        print(f"{subject}, {args.method}; best dense product {product} GFLOP/s, best clone {clone} GB/s\n")
        print("| " + " | ".join(HEAD) + " |\n" + "|---" * len(HEAD) + "|")
        for row in result["rows"]:
            print("| " + " | ".join(cells(row, machine, args.method)) + " |")
        print()


if __name__ == "__main__":
    main()
