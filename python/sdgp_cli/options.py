# SPDX-License-Identifier: BSD-3-Clause
"""Handles the options that ``sdgp bench`` and ``sdgp profile`` share."""

from __future__ import annotations

import torch

from sdgp._load import C

from . import CommandError


def begin(device: str | None, threads: int | None) -> torch.device:
    """Sets the number of threads and the seed, and returns the device after checking that it works."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    if device is None:
        return torch.device(found)
    try:
        torch.empty(1, device=device).item()  # torch has device types that it cannot reach, or that hold no values
        return torch.device(device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"expected a device that works here, such as {found}, got {device!r}: {reason}") from error


def parse_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Returns the dtype for a device. The default is a dtype for which the device has a sparse product."""
    if name is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if name not in C.dtypes:
        raise CommandError(f"expected --dtype to be one of {', '.join(C.dtypes)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype
