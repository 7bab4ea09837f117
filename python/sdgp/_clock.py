# SPDX-License-Identifier: BSD-3-Clause
"""Measures the time of a call."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def elapsed_ms(call: Callable[[], object], device: torch.device) -> float:
    """Returns the milliseconds of one call. A GPU is timed by its own events, and is as busy as in a training step."""
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
    """Waits until a device has finished its work, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
