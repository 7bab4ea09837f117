# SPDX-License-Identifier: BSD-3-Clause
"""Estimates what pruning saves on 1 to 1,024 devices from the results of train_step.py on one. Prints Markdown.

The model is data parallelism with a fixed batch per device. The products on each device get faster as measured. The
size of the weight gradients does not change, so an all-reduce moves the same number of bytes. An all-reduce of B bytes
over N devices takes 2 (N - 1) / N * B / bandwidth + 2 log2(N) * latency. It overlaps with the part of the backward that
runs after the first gradients are ready. A faster backward makes this part shorter:

    step(N) = compute + max(0, all-reduce(N) - overlap * backward),  backward = 2/3 of a plain step - the saved time

    python benchmarks/scaling.py benchmarks/results/xeon-model207-avx512.json --gb-per-s 12.5
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import models
from torch import nn

DEVICES = (1, 8, 64, 256, 1024)
MODELS = {
    "resnet18": models.resnet18,
    "resnet50": models.resnet50,
    "transformer": models.Transformer,
    "lora": lambda: models.with_adapters(models.Transformer(), 8),
}


class Network(NamedTuple):
    bytes_per_s: float
    latency_s: float
    overlap: float  # the share of the backward that can overlap with an all-reduce

    def all_reduce(self, size: float, devices: int) -> float:
        """Returns the seconds of an all-reduce of ``size`` bytes."""
        return 2 * (devices - 1) / devices * size / self.bytes_per_s + 2 * math.log2(devices) * self.latency_s


def step(compute: float, backward: float, size: float, devices: int, network: Network) -> float:
    """Returns the seconds of a training step."""
    return compute + max(0.0, network.all_reduce(size, devices) - network.overlap * backward)


def savings(row: dict[str, Any], size: float, network: Network) -> list[float]:
    """Returns the share of a step's time that pruning saves, for each number of devices."""
    plain, converted = row["plain_ms"] / 1e3, row["converted_ms"] / 1e3
    backward = plain * 2 / 3
    result = []
    for devices in DEVICES:
        before = step(plain, backward, size, devices, network)
        result.append(1 - step(converted, backward - (plain - converted), size, devices, network) / before)
    return result


def gradient_bytes(model: nn.Module, width: int) -> int:
    return width * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--gb-per-s", type=float, default=12.5, help="of the network, per device")
    parser.add_argument("--latency-us", type=float, default=10, help="of one hop")
    parser.add_argument("--overlap", type=float, default=0.8, help="of a backward pass that communication hides behind")
    parser.add_argument("--bytes", type=int, default=4, help="of a gradient's value: 2 for bfloat16")
    args = parser.parse_args()
    network = Network(args.gb_per_s * 1e9, args.latency_us * 1e-6, args.overlap)
    print("| model | N:M | all-reduce | " + " | ".join(f"{devices:,}" for devices in DEVICES) + " |")
    print("|---" * (3 + len(DEVICES)) + "|")
    for row in json.loads(args.results.read_text(encoding="utf-8"))["train_step"]["rows"]:
        if row["backend"] != "auto":
            continue
        size = gradient_bytes(MODELS[row["model"]](), args.bytes)
        cells = " | ".join(f"{saved:.1%}" for saved in savings(row, size, network))
        print(f"| {row['model']} | {row['pattern']} | {size / 1e6:.1f} MB | {cells} |")


if __name__ == "__main__":
    main()
