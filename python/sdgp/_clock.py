# SPDX-License-Identifier: BSD-3-Clause
"""Reading a clock around a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call; on a GPU by its own clock, in the state it has between the kernels of a step."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    event: Callable[..., Any] = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    with torch.cuda.device(device):
        call()  # keeps the GPU busy while the launches of the timed call are queued
        begin.record()
        call()
        end.record()
        end.synchronize()
    return float(begin.elapsed_time(end))


def synchronize(device: torch.device) -> None:
    """Waits for what was asked of a device, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
